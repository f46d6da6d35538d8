"""What every transport promises, and the values it is spoken to with."""

from __future__ import annotations

import asyncio
import enum
import os
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lmkv_ray.keys import KeyArray
from lmkv_ray.transports.chunk_reader import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Capabilities:
    """What callers and tests need to know of a transport."""

    same_host: bool
    """Reaches only peers that share our kernel, pid namespace and user."""
    one_sided: bool
    """The peer's shard takes no part: it may be busy or hang, and the fetch goes on."""
    verified: bool
    """Bytes cross a network, so each chunk is checked against its checksum when it is in place."""


@dataclass(frozen=True)
class PeerInfo:
    """A shard to fetch from."""

    node_id: str
    host: str
    """The peer's ``host_id()``."""
    arena_path: str
    arena_id: int
    read: Callable[[bytes], Awaitable[Batch]]
    """Calls the peer's ``ChunkReader.read`` with keys of 16 bytes each (for Ray: what
    ``handle.read.remote`` returns)."""
    locate: Callable[[bytes, str], Awaitable[bytes]] | None = None
    """Calls the peer's ``NixlSource.locate``."""
    nixl_obstacle: str | None = None
    """Why NIXL cannot read from the peer, as far as it knows itself."""


class Failure(enum.StrEnum):
    """Why a chunk did not arrive."""

    MISSING = "missing"
    """The peer does not hold it (any more)."""
    CHANGED = "changed"
    """The peer evicted it while it was copied."""
    CORRUPT = "corrupt"
    """What arrived does not have the chunk's checksum."""
    TOO_LARGE = "too_large"
    """It is larger than the slot."""
    LOST = "lost"
    """The peer died, or answered with an error or with nonsense."""
    LATE = "late"
    """The deadline passed."""


@dataclass(frozen=True)
class Outcome:
    """What became of one key of a fetch."""

    position: int
    """Which key of ``Fetch.keys``."""
    nbytes: int = 0
    checksum: int = 0
    """``arena.checksum`` of the bytes; 0: not known."""
    failure: Failure | None = None
    detail: str = ""
    """For logs: what the peer's failure was."""

    @property
    def ok(self) -> bool:
        """The chunk is complete in its destination."""
        return self.failure is None


@dataclass(frozen=True)
class Fetch:
    """A wish for chunks."""

    keys: KeyArray
    destinations: Sequence[npt.NDArray[np.uint8]]
    """For each key the writable bytes of a slot that is reserved for it."""
    within: float
    """Seconds from the call of ``fetch``."""


class Transport(Protocol):
    """A way to bring chunks from a peer's arena into ours.

    The life of a fetch, and who runs each step. *We* are the fetching shard; its event loop is
    never blocked, as everything that copies or computes runs in a thread.

    1. (our loop) The shard reserves a slot for each key and calls ``fetch`` with views of the
       slots. Nothing is visible to engines yet: the slots' generations are odd.
    2. (shared memory: our thread | NIXL: a process of ours, by READs | else, and for what NIXL did
       not find: a thread of the peer's actor) The keys are looked up in the peer's arena. Which are
       missing is known now.
    3. (shared memory) The bytes are copied out, and *then* the generations are checked: a chunk
       that was evicted meanwhile is reported, and its bytes are never used. (The peer's actor)
       Checksums are computed where there are none yet.
    4. (object store) Ray carries the batch, straight from the peer's arena, and a thread of ours
       copies each chunk into its slot and verifies the checksum of the bytes *in the slot*.
       (NIXL) A process of ours reads the bytes from the peer's arena into the slots and does the
       same. A chunk that was evicted and overwritten since step 2 fails there.
    5. (our loop) One ``Outcome`` for each key, as soon as its chunk is done: the shard publishes
       the slot, and engines see the chunk while others are still on their way.

    Promises:
      * Exactly one outcome for each key, in any order, at most moments after ``within`` seconds.
        Past it the rest is ``LATE``. Failures are outcomes; ``fetch`` raises nothing.
      * Once a key's outcome is there, nothing writes into its destination any more, so the slot
        may be published or given to somebody else. The same holds for all destinations when the
        iterator was closed (use ``contextlib.aclosing``) or its task was cancelled.
      * Bounded: a transport holds a few batches of bytes, however many keys are wanted.
    """

    @property
    def name(self) -> str:
        """As in the setting ``transport``."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """See ``Capabilities``."""
        ...

    def obstacle(self, peer: PeerInfo) -> str | None:
        """Why this transport cannot serve a peer; None if it can."""
        ...

    def fetch(self, peer: PeerInfo, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """Bring chunks; see the class."""
        ...


def host_id() -> str:
    """Equal for two processes exactly when they can open each other's memory through /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return f"unknown/{secrets.token_hex(8)}"  # equal to no other
    return f"{boot}/{pids}/{os.geteuid()}"


async def to_the_end(function: Callable[[], T], executor: Executor | None = None) -> T:
    """Run in a thread, and do not leave before it has ended, even when cancelled.

    It writes into slots: whoever cancels a fetch gives them away next.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, function)
    await all_ended([future])
    return future.result()


async def all_ended(futures: Iterable[asyncio.Future[T]]) -> None:
    """Wait until all have ended, also when cancelled meanwhile (that is passed on afterwards)."""
    awaited = list(futures)
    running = [future for future in awaited if not future.done()]
    cancelled = False
    while running:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError:
            cancelled = True
        running = [future for future in running if not future.done()]
    if cancelled:
        for future in awaited:
            if not future.cancelled():
                future.exception()  # nobody is left to ask for it, which asyncio would log
        raise asyncio.CancelledError


def groups(sizes: Sequence[int], limit: int, first: int | None = None) -> list[range]:
    """Positions in groups of at most ``limit`` bytes, and at least one member.

    Args:
        sizes: bytes of each.
        limit: of a group.
        first: limit of the first group; that of each later one is twice that of the one before.
    """
    result, start, total = [], 0, 0
    allowed = limit if first is None else first
    for position, size in enumerate(sizes):
        if position > start and total + size > allowed:
            result.append(range(start, position))
            start, total = position, 0
            allowed = min(2 * allowed, limit)
        total += size
    if start < len(sizes):
        result.append(range(start, len(sizes)))
    return result
