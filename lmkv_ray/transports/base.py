"""What every transport promises, and what it is told of a peer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lmkv_ray.fetch import Fetch, Outcome
from lmkv_ray.orders import Offer
from lmkv_ray.transports.chunk_reader import ChunkBatch


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
    arena_id: int
    """The peer's arena. After a restart it may be another one."""
    offers: Mapping[str, Offer]
    """What the peer says of itself for each transport that it has, by the transport's name."""
    ask: Callable[[str, bytes], Awaitable[Any]]
    """Calls ``Servers.answer`` of the peer: (name of the transport, question) -> ``Answer``."""


Answer = bytes | ChunkBatch
"""What a peer's end of a transport answers. Chunks of a ``ChunkBatch`` are not copied before they
are sent."""


class Server(Protocol):
    """The end of a transport at the shard that is read from."""

    @property
    def name(self) -> str:
        """As ``Transport.name``."""
        ...

    def offer(self, reader: str) -> Offer:
        """What readers must know.

        Args:
            reader: the ``host_id`` of the shard that is going to read; empty: no shard is.
        """
        ...

    async def answer(self, question: bytes) -> Answer:
        """Answer a question of the transport's other end, which is a stranger's message.

        Raises:
            TransportError: it cannot be answered.
        """
        ...


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
        may be published or given to another chunk. The same holds for all destinations when the
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
        """Why this transport cannot serve a peer that offers it; None if it can."""
        ...

    def fetch(self, peer: PeerInfo, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """Bring chunks; see the class."""
        ...
