"""The arena as equal *extents*: each unassigned, or cut into slots of one size class.

Slot ids are ``extent * stride + i``. A slot of an assigned extent is

    free  --take-->  pinned  --keep-->  ready  --release-->  free
                     pinned  --free-->  free

Freed slots join the tail of their class's queue and are taken from its head, so that a reader that
is still copying a chunk out is disturbed as late as possible.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from lmkv_ray.policies import Pins, Policy


class SlotUse(IntEnum):
    """What a slot is used for; ``NONE``: its extent is unassigned or being emptied."""

    NONE = 0
    FREE = 1
    PINNED = 2
    READY = 3


# Looking up a member of an enum takes longer than all else that is done with it.
_NONE, _FREE, _PINNED, _READY = (int(use) for use in SlotUse)


@dataclass(slots=True)
class SizeClass:
    """Slots of one size, in as many extents as they have now."""

    slot_bytes: int
    policy: Pins
    """Which of its chunks make room."""
    extents: list[int] = field(default_factory=list)
    free: deque[int] = field(default_factory=deque)


class Extents:
    """Assigns extents to size classes, and keeps each class's free slots.

    Args:
        count: how many there are.
        extent_bytes: size of each.
        min_slot_bytes: the smallest slot, which decides the slot ids of an extent.
        make_policy: called once for each size class.
    """

    def __init__(
        self,
        count: int,
        extent_bytes: int,
        min_slot_bytes: int,
        make_policy: Callable[[], Policy],
    ) -> None:
        self.count = count
        self.extent_bytes = extent_bytes
        self.min_slot_bytes = min_slot_bytes
        self.stride = extent_bytes // min_slot_bytes
        """Slot ids per extent."""
        self.use = np.full((count, self.stride), SlotUse.NONE, dtype=np.uint8)
        self.classes: dict[int, SizeClass] = {}
        """By the size of their slots."""
        self.pinned = [0] * count
        """Pinned slots of each extent."""
        self.draining: int | None = None
        """The extent of which no slot is handed out any more."""
        self.class_of: list[SizeClass | None] = [None] * count
        """The class of each extent; None: unassigned."""
        self._unassigned = deque(range(count))
        self._lost: list[int] = []
        self._new = set(range(count))
        self._make_policy = make_policy
        self._use = self.use.reshape(-1)  # by slot

    # -- what there is ---------------------------------------------------------------------------

    def fits(self, slot_bytes: int) -> bool:
        """Whether slots of this size can exist here."""
        return self.min_slot_bytes <= slot_bytes <= self.extent_bytes

    def capacity(self, slot_bytes: int) -> int:
        """Slots of this size if the whole arena were theirs."""
        return (self.count - len(self._lost)) * (self.extent_bytes // slot_bytes)

    def slot_bytes(self, slot: int) -> int | None:
        """The size of a slot; None if it does not exist at present."""
        extent, i = divmod(slot, self.stride)
        if slot < 0 or extent >= self.count or self.use[extent, i] == _NONE:
            return None
        size = self.class_of[extent]
        return size.slot_bytes if size else None

    def pinned_slots(self, slot_bytes: int) -> int:
        """Pinned slots of one size class."""
        size = self.classes.get(slot_bytes)
        return sum(self.pinned[extent] for extent in size.extents) if size else 0

    def of_others(self, size: SizeClass) -> list[int]:
        """Extents that are assigned to other classes."""
        return [
            extent
            for extent, other in enumerate(self.class_of)
            if other is not None and other is not size
        ]

    def ready(self, extent: int) -> list[int]:
        """Slots of an extent that hold chunks."""
        first = extent * self.stride
        return [first + i for i in np.flatnonzero(self.use[extent] == _READY).tolist()]

    # -- extents ---------------------------------------------------------------------------------

    def size_class(self, slot_bytes: int) -> SizeClass:
        """The class of slots of this size, maybe a new one without any."""
        size = self.classes.get(slot_bytes)
        if size is None:
            size = self.classes[slot_bytes] = SizeClass(slot_bytes, Pins(self._make_policy()))
        return size

    def assign(self, size: SizeClass) -> int | None:
        """Cut the next unassigned extent for a class; None: there is none."""
        if not self._unassigned:
            return None
        extent = self._unassigned.popleft()
        self._cut(size, extent)
        return extent

    def vacate(self, extent: int) -> None:
        """An extent in which nothing is pinned or ready becomes unassigned, and the next to be."""
        self._withdraw(extent)
        if self.draining == extent:
            self.draining = None
        self._part(extent)
        self._new.discard(extent)
        self._unassigned.appendleft(extent)

    def drain(self, extent: int) -> None:
        """Hand out no slot of an extent any more."""
        self.draining = extent
        self._withdraw(extent)

    def adopt(self, extent: int, slot_bytes: int, slots: Iterable[int]) -> None:
        """Take an unassigned extent as a predecessor left it: these slots pinned, others free."""
        self._unassigned.remove(extent)
        self._new.discard(extent)
        size = self.size_class(slot_bytes)
        self._cut(size, extent)
        pinned = set(slots)
        size.free = deque(slot for slot in size.free if slot not in pinned)
        for slot in pinned:
            self._use[slot] = _PINNED
        self.pinned[extent] = len(pinned)

    def lose(self, extent: int) -> None:
        """There is no memory for an extent that was assigned just now.

        So there is none for others that never had any: do without all of them until ``regain``.
        """
        self._withdraw(extent)
        self.use[extent] = _NONE
        self.pinned[extent] = 0
        self._part(extent)
        self._lost += [extent, *(other for other in self._unassigned if other in self._new)]
        self._unassigned = deque(other for other in self._unassigned if other not in self._new)

    def regain(self) -> None:
        """There may be memory again for what was lost."""
        self._unassigned.extend(sorted(self._lost))
        self._lost.clear()

    def discard(self, size: SizeClass) -> None:
        """Forget a class if it has no extents."""
        if not size.extents:
            self.classes.pop(size.slot_bytes, None)

    # -- slots -----------------------------------------------------------------------------------

    def take(self, size: SizeClass, n: int) -> tuple[int, ...]:
        """Pin up to ``n`` free slots."""
        slots = tuple(size.free.popleft() for _ in range(min(n, len(size.free))))
        for slot in slots:
            self._use[slot] = _PINNED
            self.pinned[slot // self.stride] += 1
        return slots

    def keep(self, slot: int) -> SizeClass:
        """A pinned slot holds a chunk now; returns its class."""
        size = self._unpin(slot)
        self._use[slot] = _READY
        return size

    def free(self, slot: int) -> None:
        """A pinned slot is free again."""
        self._unpin(slot)
        self.release(slot)

    def release(self, slot: int) -> None:
        """A ready slot holds no chunk any more."""
        extent = slot // self.stride
        if extent == self.draining:
            self._use[slot] = _NONE
            return
        size = self.class_of[extent]
        assert size is not None
        self._use[slot] = _FREE
        size.free.append(slot)

    # -- inside ----------------------------------------------------------------------------------

    def _unpin(self, slot: int) -> SizeClass:
        extent = slot // self.stride
        size = self.class_of[extent]
        assert size is not None
        assert self._use[slot] == _PINNED
        self.pinned[extent] -= 1
        return size

    def _cut(self, size: SizeClass, extent: int) -> None:
        size.extents.append(extent)
        self.class_of[extent] = size
        count = self.extent_bytes // size.slot_bytes
        self.use[extent, :count] = _FREE
        first = extent * self.stride
        size.free.extend(range(first, first + count))

    def _part(self, extent: int) -> None:
        size = self.class_of[extent]
        assert size is not None
        self.class_of[extent] = None
        size.extents.remove(extent)
        self.discard(size)

    def _withdraw(self, extent: int) -> None:
        """Take an extent's free slots away."""
        size = self.class_of[extent]
        assert size is not None
        size.free = deque(slot for slot in size.free if slot // self.stride != extent)
        self.use[extent][self.use[extent] == _FREE] = _NONE
