"""The ready chunks of a shard; tells directory, tiers and counters of every change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lmkv_ray.hints import Hints
from lmkv_ray.keys import KEY_BYTES
from lmkv_ray.messages import MissReason
from lmkv_ray.shard.admission import Admission
from lmkv_ray.shard.allocator import Allocator, Evicted
from lmkv_ray.shard.deltas import DeltaLog
from lmkv_ray.shard.instructions import Retire
from lmkv_ray.shard.values import Counters
from lmkv_ray.tenants import covers


@dataclass(frozen=True, slots=True)
class _Chunk:
    space: int
    nbytes: int


class Chunks:
    """Keys of ready chunks, in no particular order.

    Args:
        allocator: knows the slot of each ready chunk, and evicts.
        deltas: collects the keys that come and go, for the directory.
        admission: told of chunks that come, go, or are used; selects those that tiers store.
        counters: the shard's, raised by each change.
    """

    def __init__(
        self, allocator: Allocator, deltas: DeltaLog, admission: Admission, counters: Counters
    ) -> None:
        self.nbytes = 0
        """Bytes of all ready chunks."""
        self.admission = admission
        self._allocator = allocator
        self._deltas = deltas
        self._counters = counters
        self._chunks: dict[bytes, _Chunk] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)

    # -- what is known of chunks -------------------------------------------------------------------

    def slot(self, key: bytes) -> int | None:
        """The slot of a chunk; None: it is not ready."""
        return self._allocator.slot_of.get(key)

    def space(self, key: bytes) -> int | None:
        """The space of a chunk."""
        chunk = self._chunks.get(key)
        return None if chunk is None else chunk.space

    def space_size_and_pin(self, key: bytes) -> tuple[int, int, bool] | None:
        """(space, size of its slot in bytes, whether pinned) of a chunk; None: it is not ready."""
        chunk = self._chunks.get(key)
        return None if chunk is None else (chunk.space, *self._allocator.size_and_pin(key))

    def by_worth(self) -> list[bytes]:
        """Keys of all chunks: the pinned ones, then the last used first."""
        return self._allocator.by_worth()

    def pinned(self) -> list[bytes]:
        """Keys of chunks that are not evicted to make room."""
        return self._allocator.pinned_chunks()

    def validate(self) -> None:
        """Compare chunks, slots and admission with each other, for tests and simulations.

        Raises:
            AssertionError: they contradict each other; the text says how.
        """
        self._allocator.validate()
        known = self._allocator.slot_of.keys()
        assert self._chunks.keys() == known, f"{len(self)} chunks, {len(known)} have slots"
        nbytes = sum(chunk.nbytes for chunk in self._chunks.values())
        assert nbytes == self.nbytes, f"chunks have {nbytes} bytes, counted {self.nbytes}"
        self.admission.validate(known)

    # -- what happens to chunks --------------------------------------------------------------------

    def add(self, slot: int, key: bytes, nbytes: int, hints: Hints) -> bool:
        """A reserved slot holds a chunk now. ``added`` then tells the others.

        Returns:
            False: the eviction policy failed; nothing was changed.
        """
        if not self._allocator.fill(slot, key, hints):
            return False
        self._chunks[key] = _Chunk(hints.space, nbytes)
        self.nbytes += nbytes
        return True

    def added(self, keys: Iterable[bytes]) -> None:
        """Tell of chunks that are new (not of those that a predecessor left), heads first."""
        keys = list(keys)
        self._deltas.added(keys)
        self.admission.committed(keys)
        self._counters.committed += len(keys)

    def touch(self, keys: bytes) -> None:
        """Chunks were hit, deepest of a prompt first; 16 bytes each."""
        whole = len(keys) - len(keys) % KEY_BYTES
        touched = [keys[i : i + KEY_BYTES] for i in range(0, whole, KEY_BYTES)]
        self._allocator.touch(touched)
        # Heads first: written in this order, what is there is a prefix whenever the writing stops.
        self.admission.touched(key for key in reversed(touched) if key in self._chunks)

    def pin(self, keys: Iterable[bytes], pinned: bool) -> list[bytes]:
        """Pin or unpin chunks; returns the keys that are pinned now.

        Unknown keys are ignored. At most half of the arena can be pinned.
        """
        return [key for key in keys if self._allocator.pin(key, pinned)]

    def pin_for_request(self, key: bytes) -> None:
        """Keep a chunk because a request says so, if requests may pin one more."""
        self._allocator.pin_for_request(key)

    def remove(self, keys: Iterable[bytes], reason: MissReason) -> list[Retire]:
        """Remove chunks, pinned or not; unknown keys are ignored."""
        known = dict.fromkeys(key for key in keys if key in self._chunks)
        return self.gone(self._allocator.evict(known), reason)

    def clear(self, space: int | None) -> list[Retire]:
        """Remove all chunks (of one space)."""
        keys = [key for key, chunk in self._chunks.items() if covers(space, chunk.space)]
        return self.remove(keys, MissReason.CLEARED)

    def gone(self, evicted: Evicted, reason: MissReason) -> list[Retire]:
        """The allocator has removed these chunks."""
        if not evicted.slots:
            return []
        for key in evicted.keys:
            self.nbytes -= self._chunks.pop(key).nbytes
        if reason is MissReason.CLEARED:
            self._counters.cleared += len(evicted.slots)
        else:
            self._counters.evicted += len(evicted.slots)
        self._deltas.removed(evicted.keys)
        self.admission.removed(evicted.keys)
        return [Retire(evicted.slots, reason)]
