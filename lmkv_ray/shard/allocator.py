"""Which chunk is in which slot, and who makes room for whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies import Policy
from lmkv_ray.shard.extents import Extents, SizeClass


@dataclass(frozen=True, slots=True)
class Evicted:
    """Ready chunks that were removed to make room; their slots are free (or unassigned)."""

    slots: tuple[int, ...]
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Assigned:
    """An extent was cut into slots of ``slot_bytes``."""

    extent: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Taken:
    """Slots that are pinned now, and what was done to get them, in order."""

    slots: tuple[int, ...]
    steps: tuple[Evicted | Assigned, ...]


class Allocator:
    """Hands out slots; evicts to make room; always makes progress.

    A class that needs room takes an unassigned extent, else evicts its own victims. It takes over
    another class's coldest extent when it has no chunk left to evict, or when everything in that
    extent was used less recently than its own next victim (so a model that is no longer
    served gives its memory to the others). Extents with pinned slots or chunks cannot be taken
    over; when only such are left, one is drained: no slot of it is handed out any more, and it
    becomes unassigned when the last pinned slot is free. So a pinned chunk gives way only to a
    model that would have no memory at all.

    Args:
        extents: how many there are.
        extent_bytes: size of each.
        min_slot_bytes: the smallest slot.
        make_policy: called once for each size class.
    """

    def __init__(
        self,
        extents: int,
        extent_bytes: int,
        min_slot_bytes: int,
        make_policy: Callable[[], Policy],
    ) -> None:
        self.extents = Extents(extents, extent_bytes, min_slot_bytes, make_policy)
        self.slot_of: dict[bytes, int] = {}
        """Every ready chunk."""
        self._key_of: dict[int, bytes] = {}
        self._stride, self._class_of = self.extents.stride, self.extents.class_of
        self._kept = [0] * extents  # pinned chunks
        # When each ready chunk was last used, by a counter of uses; 0 for slots without chunk.
        self._used_at = np.zeros((extents, self._stride), dtype=np.int64)
        self._used = self._used_at.reshape(-1)  # by slot
        self._clock = 0

    # -- what there is ---------------------------------------------------------------------------

    def place(self, key: bytes) -> tuple[int, bool]:
        """(slot_bytes, pinned) of a ready chunk."""
        size = self._class_of[self.slot_of[key] // self._stride]
        assert size is not None
        return size.slot_bytes, key in size.policy.pinned

    def by_worth(self) -> list[bytes]:
        """All ready chunks: the pinned ones, then the last used first."""
        pinned = self.pinned_chunks()
        keys = list(self.slot_of)
        slots = np.fromiter(self.slot_of.values(), np.int64, len(keys))
        order = np.argsort(-self._used[slots])
        return list(dict.fromkeys([*pinned, *(keys[i] for i in order.tolist())]))

    def pinned_chunks(self) -> list[bytes]:
        """Chunks that are not evicted to make room."""
        return [key for size in self.extents.classes.values() for key in size.policy.pinned]

    # -- what happens to chunks ------------------------------------------------------------------

    def take(self, slot_bytes: int, n: int) -> Taken:
        """Pin up to ``n`` free slots, evicting and assigning extents as needed."""
        if n <= 0:
            return Taken((), ())
        steps: list[Evicted | Assigned] = []
        self._finish_drain(steps)
        size = self.extents.size_class(slot_bytes)
        while self._make_room(size, n, steps):
            pass
        slots = self.extents.take(size, n)
        if not slots:
            self._start_drain(size)
        self.extents.discard(size)
        return Taken(slots, tuple(steps))

    def fill(self, slot: int, key: bytes, hints: Hints = NO_HINTS) -> None:
        """A pinned slot is ready, as ``key`` (which no other slot has)."""
        size = self.extents.keep(slot)
        self.slot_of[key] = slot
        self._key_of[slot] = key
        size.policy.added(key, hints)
        self._mark_used(slot)
        if hints.pinned:
            self.pin(key, True)

    def evict(self, keys: Iterable[bytes]) -> Evicted:
        """Remove these chunks, which are all ready."""
        keys = tuple(keys)
        slots = tuple(self.slot_of[key] for key in keys)
        for slot, key in zip(slots, keys, strict=True):
            size = self._class_of[slot // self._stride]
            assert size is not None
            self._kept[slot // self._stride] -= key in size.policy.pinned
            size.policy.removed(key)
            del self.slot_of[key], self._key_of[slot]
            self._used[slot] = 0
            self.extents.release(slot)
        return Evicted(slots, keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Chunks were hit, deepest chunk of a prompt first; unknown keys are ignored."""
        by_class: dict[int, list[bytes]] = {}
        for key in keys:
            slot = self.slot_of.get(key)
            if slot is not None:
                self._mark_used(slot)
                size = self._class_of[slot // self._stride]
                assert size is not None
                by_class.setdefault(size.slot_bytes, []).append(key)
        for slot_bytes, own in by_class.items():
            self.extents.classes[slot_bytes].policy.touched(own)

    def pin(self, key: bytes, pinned: bool) -> bool:
        """Pin a chunk or let it go; whether it is pinned now.

        Unknown keys are ignored. Of one size class, half of the slots it may have can be pinned.
        """
        slot = self.slot_of.get(key)
        if slot is None:
            return False
        extent = slot // self._stride
        size = self._class_of[extent]
        assert size is not None
        keys = size.policy.pinned
        room = 2 * (len(keys) + 1) <= self.extents.capacity(size.slot_bytes)
        if pinned and key not in keys and room:
            self._kept[extent] += 1
            size.policy.pin(key, True)
        elif not pinned and key in keys:
            self._kept[extent] -= 1
            size.policy.pin(key, False)
        return key in keys

    # -- making room -----------------------------------------------------------------------------

    def _make_room(self, size: SizeClass, n: int, steps: list[Evicted | Assigned]) -> bool:
        """One step towards ``n`` free slots and a few that rest; False: enough, or no step left."""
        # Evicted slots rest a little at the tail of the queue before they are written again.
        slots = len(size.extents) * (self.extents.extent_bytes // size.slot_bytes)
        short = n + min(64, slots // 32) - len(size.free)
        if short <= 0:
            return False
        if self._assign(size, steps):
            return True
        victims = size.policy.victims(short)
        if len(size.free) < n:
            oldest = int(self._used[self.slot_of[victims[0]]]) if victims else None
            extent = self._coldest(size, oldest)
            if extent is not None:
                steps.append(self._clear(extent))
                return self._assign(size, steps)
        if victims:
            steps.append(self.evict(victims))
        return bool(victims)

    def _assign(self, size: SizeClass, steps: list[Evicted | Assigned]) -> bool:
        extent = self.extents.assign(size)
        if extent is not None:
            steps.append(Assigned(extent, size.slot_bytes))
        return extent is not None

    def _coldest(self, size: SizeClass, older_than: int | None) -> int | None:
        """The extent of another class whose last use is longest ago, if it may be taken over."""
        pinned, kept = self.extents.pinned, self._kept
        others = [e for e in self.extents.of_others(size) if not (pinned[e] or kept[e])]
        if not others:
            return None
        last_used = self._used_at[others].max(axis=1)
        coldest = int(last_used.argmin())
        if older_than is not None and last_used[coldest] >= older_than:
            return None
        return others[coldest]

    def _start_drain(self, size: SizeClass) -> None:
        others = self.extents.of_others(size)
        if self.extents.draining is None and others:
            pinned, kept = self.extents.pinned, self._kept
            self.extents.drain(min(others, key=lambda extent: (pinned[extent], kept[extent])))

    def _finish_drain(self, steps: list[Evicted | Assigned]) -> None:
        extent = self.extents.draining
        if extent is not None and not self.extents.pinned[extent]:
            steps.append(self._clear(extent))

    def _clear(self, extent: int) -> Evicted:
        """Evict everything in an extent without pinned slots, and leave it unassigned."""
        evicted = self.evict(self._key_of[slot] for slot in self.extents.ready(extent))
        self.extents.vacate(extent)
        return evicted

    def _mark_used(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock
