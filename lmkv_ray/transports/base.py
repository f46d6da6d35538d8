"""What every transport promises, and what it is told of a peer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from lmkv_ray.fetch import Fetch, Outcome
from lmkv_ray.transports.chunk_reader import Batch


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
