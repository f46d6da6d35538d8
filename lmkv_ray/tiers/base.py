"""What every tier below memory promises, and the values it is spoken to with."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmkv_ray.fetch import Fetch, Outcome
from lmkv_ray.keys import KeyArray
from lmkv_ray.status import TierStatus
from lmkv_ray.tiers.clears import Unheard


@dataclass(frozen=True)
class TierCapabilities:
    """What callers and tests need to know of a tier."""

    shared: bool
    """Other nodes (and clusters) see what is stored here: no node needs to store it twice."""
    instant: bool
    """``lookup`` answers from this process's memory."""


@dataclass(frozen=True)
class TierChunk:
    """A chunk to be stored, as it lies in the arena."""

    key: bytes
    space: int
    data: npt.NDArray[np.uint8]
    """The chunk's bytes: a view of its slot, which may be given to another chunk at any time."""
    intact: Callable[[], bool]
    """Whether the slot held this chunk all the time until now. Asked after the bytes were written
    and before they can be found: if not, they are thrown away. Called in a thread of the tier."""


class Tier(Protocol):
    """A store below memory that keeps chunks: disk, an object store.

    The life of a chunk below memory, and who runs each step. All methods are called on the shard's
    event loop, which is never blocked: whatever waits or computes runs in threads of the tier.

    1. (shard) A chunk in the arena has earned a tier (see the admission setting): ``store``.
    2. (tier) The bytes are written with key, space, size and checksum, under a name that no
       reader looks at. Then ``intact`` is asked; only if it holds, the chunk is published in one
       atomic step.
    3. (shard) A prompt wants a chunk that memory does not hold: ``lookup``, then ``fetch`` into
       slots that are reserved for it, exactly as from a peer.
    4. (tier) What was read is verified in place (key, size, checksum). What does not match is
       reported ``CORRUPT``, removed, and never served again.

    Promises:
      * ``fetch`` promises what ``Transport.fetch`` does: one outcome for each key, in time, no
        writes into a destination after its outcome or after the iterator was closed. Where these
        two exclude each other the second one wins: a read that a kernel or device does not give
        back holds back its own outcome and the end of the iterator, and no other outcome. So a
        caller that must answer in time waits for outcomes with a timeout of its own, and leaves the
        iterator to a task that gives back the slots when it has ended.
      * No method raises. A tier in trouble (full, gone, refused, too slow) says so in
        ``status().problem``, answers as if it were empty, and tries again by itself.
      * Bounded: bytes on the medium, bytes and requests in flight, threads.
    """

    @property
    def name(self) -> str:
        """As people see it: ``disk``, ``remote``."""
        ...

    @property
    def capabilities(self) -> TierCapabilities:
        """See ``TierCapabilities``."""
        ...

    async def lookup(self, keys: KeyArray, within: float) -> npt.NDArray[np.bool_]:
        """Which chunks it holds, as far as it can tell within so many seconds (others: no).

        The keys are a run, of which nothing is of use behind a gap: a tier that is not ``instant``
        may stop at the first one that it does not hold.
        """
        ...

    def fetch(self, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """Bring chunks into slots; see the class."""
        ...

    async def store(self, chunks: Sequence[TierChunk]) -> list[bool]:
        """Write chunks; whether each can be found here now (also if it could before)."""
        ...

    async def clear(self, space: int | None, number: int) -> None:
        """Forget all chunks (of one space): none is served from now on, nor one that was being
        stored. What the medium does not allow now is done when it does, see ``settled``.

        Args:
            space: None: all.
            number: of the clear, higher than those before; 0: it has none. A tier outlives the
                memory of the one that gives the order: it does not repeat a clear that it has
                carried out.
        """
        ...

    @property
    def cleared(self) -> int:
        """The number of the last clear that was carried out here, also by a predecessor; 0: not
        known, or a matter of all that share it.
        """
        ...

    @property
    def settled(self) -> bool:
        """No clear is left to be carried out."""
        ...

    @property
    def unheard(self) -> list[Unheard]:
        """Clears by clusters that share the medium. Nothing that they cover is stored until
        ``clear`` or ``heard`` says that memory holds nothing any more of what they cover.
        """
        ...

    def heard(self, clear: Unheard) -> None:
        """Memory had carried it out already."""
        ...

    async def pin(self, keys: KeyArray, pinned: bool) -> None:
        """Chunks that are not to be evicted to make room, or may be again."""
        ...

    def status(self) -> TierStatus:
        """For people."""
        ...

    async def close(self) -> None:
        """Finish or abandon what is under way, end threads, let go of the medium."""
        ...
