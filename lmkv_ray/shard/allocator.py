"""Which slot is used for what: extents, size classes, free slots, and the chunks in them.

The arena is cut into equal *extents*. An extent is unassigned, or cut into slots of one size class.
Slot ids are ``extent * slots_per_extent_max + i``. A slot of an assigned extent is

    free  --take-->  pinned  --fill-->  ready  --evict-->  free
                     pinned  --free-->  free

Freed slots join the tail of their class's queue and are taken from its head, so that a reader that
is still copying a chunk out is disturbed as late as possible.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies import Pins, Policy


class SlotUse(IntEnum):
    """What a slot is used for; ``NONE``: its extent is unassigned or being emptied."""

    NONE = 0
    FREE = 1
    PINNED = 2
    READY = 3


# Looking up a member of an enum takes longer than all else that is done with it.
_FREE, _PINNED, _READY = int(SlotUse.FREE), int(SlotUse.PINNED), int(SlotUse.READY)


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


@dataclass(slots=True)
class _SizeClass:
    slot_bytes: int
    policy: Pins
    extents: list[int] = field(default_factory=list)
    free: deque[int] = field(default_factory=deque)


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
        min_slot_bytes: the smallest slot, which decides the slot ids of an extent.
        make_policy: called once for each size class.
    """

    def __init__(
        self,
        extents: int,
        extent_bytes: int,
        min_slot_bytes: int,
        make_policy: Callable[[], Policy],
    ) -> None:
        self.extents = extents
        self.extent_bytes = extent_bytes
        self.min_slot_bytes = min_slot_bytes
        self.stride = extent_bytes // min_slot_bytes
        """Slot ids per extent."""
        self.slot_of: dict[bytes, int] = {}
        """Every ready chunk."""
        self.key_of: dict[int, bytes] = {}
        self.use = np.full((extents, self.stride), SlotUse.NONE, dtype=np.uint8)
        self._make_policy = make_policy
        self._classes: dict[int, _SizeClass] = {}
        self._class_of: list[_SizeClass | None] = [None] * extents
        self._unassigned = deque(range(extents))
        self._draining: int | None = None
        self._lost = 0
        self._pinned = [0] * extents
        self._kept = [0] * extents  # pinned chunks
        # When each ready chunk was last used, by a counter of uses; 0 for slots without chunk.
        self._used_at = np.zeros((extents, self.stride), dtype=np.int64)
        self._clock = 0
        self._use, self._used = self.use.reshape(-1), self._used_at.reshape(-1)  # by slot

    # -- what there is ---------------------------------------------------------------------------

    def fits(self, slot_bytes: int) -> bool:
        """Whether slots of this size can exist here."""
        return self.min_slot_bytes <= slot_bytes <= self.extent_bytes

    def capacity(self, slot_bytes: int) -> int:
        """Slots of this size if the whole arena were theirs."""
        return (self.extents - self._lost) * (self.extent_bytes // slot_bytes)

    def slot_bytes(self, slot: int) -> int | None:
        """The size of a slot; None if it does not exist at present."""
        extent, i = divmod(slot, self.stride)
        if slot < 0 or extent >= self.extents or self.use[extent, i] == SlotUse.NONE:
            return None
        size = self._class_of[extent]
        return size.slot_bytes if size else None

    def pinned(self, slot_bytes: int) -> int:
        """Pinned slots of one size class."""
        size = self._classes.get(slot_bytes)
        return sum(self._pinned[extent] for extent in size.extents) if size else 0

    def place(self, key: bytes) -> tuple[int, bool]:
        """(slot_bytes, pinned) of a ready chunk."""
        size = self._class_of[self.slot_of[key] // self.stride]
        assert size is not None
        return size.slot_bytes, key in size.policy.pinned

    def by_worth(self) -> list[bytes]:
        """All ready chunks: the pinned ones, then the last used first."""
        pinned = self.pinned_chunks()
        keys = list(self.slot_of)
        slots = np.fromiter(self.slot_of.values(), np.int64, len(keys))
        order = np.argsort(-self._used_at.flat[slots])
        return list(dict.fromkeys([*pinned, *(keys[i] for i in order.tolist())]))

    def pinned_chunks(self) -> list[bytes]:
        """Chunks that are not evicted to make room."""
        return [key for size in self._classes.values() for key in size.policy.pinned]

    # -- life of a slot --------------------------------------------------------------------------

    def take(self, slot_bytes: int, n: int) -> Taken:
        """Pin up to ``n`` free slots, evicting and assigning extents as needed."""
        if n <= 0:
            return Taken((), ())
        steps: list[Evicted | Assigned] = []
        self._finish_drain(steps)
        size = self._classes.get(slot_bytes)
        if size is None:
            size = self._new_class(slot_bytes)
        while self._make_room(size, n, steps):
            pass
        slots = tuple(size.free.popleft() for _ in range(min(n, len(size.free))))
        for slot in slots:
            self._use[slot] = _PINNED
            self._pinned[slot // self.stride] += 1
        if not slots:
            self._start_drain(size)
        if not size.extents:
            del self._classes[slot_bytes]
        return Taken(slots, tuple(steps))

    def fill(self, slot: int, key: bytes, hints: Hints = NO_HINTS) -> None:
        """A pinned slot is ready, as ``key`` (which no other slot has)."""
        size = self._unpin(slot)
        self._use[slot] = _READY
        self.slot_of[key] = slot
        self.key_of[slot] = key
        size.policy.added(key, hints)
        self._mark_used(slot)
        if hints.pinned:
            self.pin(key, True)

    def free(self, slot: int) -> None:
        """A pinned slot is free again."""
        self._unpin(slot)
        self._release(slot)

    def evict(self, keys: Iterable[bytes]) -> Evicted:
        """Remove these chunks, which are all ready."""
        keys = tuple(keys)
        slots = tuple(self.slot_of[key] for key in keys)
        for slot, key in zip(slots, keys, strict=True):
            size = self._class_of[slot // self.stride]
            assert size is not None
            self._kept[slot // self.stride] -= key in size.policy.pinned
            size.policy.removed(key)
            del self.slot_of[key], self.key_of[slot]
            self._release(slot)
        return Evicted(slots, keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Chunks were hit, deepest chunk of a prompt first; unknown keys are ignored."""
        by_class: dict[int, list[bytes]] = {}
        for key in keys:
            slot = self.slot_of.get(key)
            if slot is not None:
                self._mark_used(slot)
                size = self._class_of[slot // self.stride]
                assert size is not None
                by_class.setdefault(size.slot_bytes, []).append(key)
        for slot_bytes, own in by_class.items():
            self._classes[slot_bytes].policy.touched(own)

    def pin(self, key: bytes, pinned: bool) -> bool:
        """Pin a chunk or let it go; whether it is pinned now.

        Unknown keys are ignored. Of one size class, half of the slots it may have can be pinned.
        """
        slot = self.slot_of.get(key)
        if slot is None:
            return False
        extent = slot // self.stride
        size = self._class_of[extent]
        assert size is not None
        keys = size.policy.pinned
        room = 2 * (len(keys) + 1) <= self.capacity(size.slot_bytes)
        if pinned and key not in keys and room:
            self._kept[extent] += 1
            size.policy.pin(key, True)
        elif not pinned and key in keys:
            self._kept[extent] -= 1
            size.policy.pin(key, False)
        return key in keys

    def adopt(self, extent: int, slot_bytes: int, slots: Iterable[int]) -> None:
        """Take an unassigned extent as a predecessor left it: these slots pinned, others free."""
        self._unassigned.remove(extent)
        size = self._classes.get(slot_bytes)
        if size is None:
            size = self._new_class(slot_bytes)
        self._cut(size, extent)
        pinned = set(slots)
        size.free = deque(slot for slot in size.free if slot not in pinned)
        for slot in pinned:
            self._use[slot] = _PINNED
        self._pinned[extent] = len(pinned)

    def lose(self, extent: int) -> None:
        """There is no memory for an extent that was assigned just now: do without it."""
        size = self._class_of[extent]
        assert size is not None
        self._withdraw_free(extent)
        self.use[extent] = SlotUse.NONE
        self._pinned[extent] = 0
        self._class_of[extent] = None
        size.extents.remove(extent)
        if not size.extents:
            self._classes.pop(size.slot_bytes, None)
        self._lost += 1

    # -- making room -----------------------------------------------------------------------------

    def _make_room(self, size: _SizeClass, n: int, steps: list[Evicted | Assigned]) -> bool:
        """One step towards ``n`` free slots and a few that rest; False: enough, or no step left."""
        # Evicted slots rest a little at the tail of the queue before they are written again.
        rest = min(64, len(size.extents) * (self.extent_bytes // size.slot_bytes) // 32)
        short = n + rest - len(size.free)
        if short <= 0:
            return False
        if self._unassigned:
            steps.append(self._assign(size, self._unassigned.popleft()))
            return True
        victims = size.policy.victims(short)
        if len(size.free) < n:
            oldest = int(self._used[self.slot_of[victims[0]]]) if victims else None
            extent = self._coldest(size, oldest)
            if extent is not None:
                steps.append(self._clear_extent(extent))
                self._unassigned.remove(extent)
                steps.append(self._assign(size, extent))
                return True
        if victims:
            steps.append(self.evict(victims))
        return bool(victims)

    def _coldest(self, size: _SizeClass, older_than: int | None) -> int | None:
        """The extent of another class whose last use is longest ago, if it may be taken over."""
        others = [
            extent
            for extent, other in enumerate(self._class_of)
            if other is not None
            and other is not size
            and not self._pinned[extent]
            and not self._kept[extent]
        ]
        if not others:
            return None
        last_used = self._used_at[others].max(axis=1)
        coldest = int(last_used.argmin())
        if older_than is not None and last_used[coldest] >= older_than:
            return None
        return others[coldest]

    def _new_class(self, slot_bytes: int) -> _SizeClass:
        size = self._classes[slot_bytes] = _SizeClass(slot_bytes, Pins(self._make_policy()))
        return size

    def _start_drain(self, size: _SizeClass) -> None:
        others = [
            extent
            for extent, other in enumerate(self._class_of)
            if other is not None and other is not size
        ]
        if self._draining is None and others:
            extent = self._draining = min(
                others, key=lambda extent: (self._pinned[extent], self._kept[extent])
            )
            self._withdraw_free(extent)

    def _finish_drain(self, steps: list[Evicted | Assigned]) -> None:
        if self._draining is not None and not self._pinned[self._draining]:
            steps.append(self._clear_extent(self._draining))

    def _assign(self, size: _SizeClass, extent: int) -> Assigned:
        self._cut(size, extent)
        return Assigned(extent, size.slot_bytes)

    def _cut(self, size: _SizeClass, extent: int) -> None:
        size.extents.append(extent)
        self._class_of[extent] = size
        count = self.extent_bytes // size.slot_bytes
        self.use[extent, :count] = SlotUse.FREE
        first = extent * self.stride
        size.free.extend(range(first, first + count))

    def _clear_extent(self, extent: int) -> Evicted:
        """Evict everything in an extent without pins, and leave it unassigned."""
        size = self._class_of[extent]
        assert size is not None
        assert not self._pinned[extent]
        first = extent * self.stride
        evicted = self.evict(
            self.key_of[first + i] for i in np.flatnonzero(self.use[extent] == SlotUse.READY)
        )
        self._withdraw_free(extent)
        if self._draining == extent:
            self._draining = None
        size.extents.remove(extent)
        if not size.extents:
            del self._classes[size.slot_bytes]
        self._class_of[extent] = None
        self._unassigned.append(extent)
        return evicted

    def _withdraw_free(self, extent: int) -> None:
        size = self._class_of[extent]
        assert size is not None
        size.free = deque(slot for slot in size.free if slot // self.stride != extent)
        self.use[extent][self.use[extent] == SlotUse.FREE] = SlotUse.NONE

    # -- bookkeeping -----------------------------------------------------------------------------

    def _mark_used(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock

    def _unpin(self, slot: int) -> _SizeClass:
        extent = slot // self.stride
        size = self._class_of[extent]
        assert size is not None
        assert self._use[slot] == _PINNED
        self._pinned[extent] -= 1
        return size

    def _release(self, slot: int) -> None:
        self._used[slot] = 0
        extent = slot // self.stride
        if extent == self._draining:
            self._use[slot] = SlotUse.NONE
            return
        size = self._class_of[extent]
        assert size is not None
        self._use[slot] = _FREE
        size.free.append(slot)
