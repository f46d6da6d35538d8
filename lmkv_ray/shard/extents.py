"""The arena as equal *extents*: each unassigned, or cut into slots of one size class.

Slot ids are ``extent * stride + i``. A slot of an assigned extent is

    free  --take-->  reserved  --mark_ready-->  ready  --release-->  free
                     reserved  --free-->  free

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
    RESERVED = 2
    READY = 3


# Looking up a member of an enum takes longer than all else that is done with it.
_NONE, _FREE, _RESERVED, _READY = (int(use) for use in SlotUse)


@dataclass(slots=True)
class SizeClass:
    """All slots of one size, and the extents that are cut into them now."""

    slot_bytes: int
    policy: Pins
    """Names the chunks of this class that are evicted to make room."""
    extents: list[int] = field(default_factory=list)
    free: deque[int] = field(default_factory=deque)


class Extents:
    """Assigns extents to size classes, and keeps each class's free slots.

    Args:
        count: number of extents in the arena.
        extent_bytes: size of an extent, in bytes.
        min_slot_bytes: size of the smallest slot, in bytes; decides how many slot ids each
            extent has.
        make_policy: makes the eviction policy of a size class.
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
        self.reserved = [0] * count
        """Number of reserved slots in each extent."""
        self.draining: int | None = None
        """The extent of which no slot is handed out any more."""
        self.class_of: list[SizeClass | None] = [None] * count
        """The class of each extent; None: unassigned."""
        self._unassigned = deque(range(count))
        self._unavailable: list[int] = []
        self._new = set(range(count))
        self._make_policy = make_policy
        self._use = self.use.reshape(-1)  # by slot

    # -- what there is ---------------------------------------------------------------------------

    def fits(self, slot_bytes: int) -> bool:
        """Whether slots of this size can exist in the arena."""
        return self.min_slot_bytes <= slot_bytes <= self.extent_bytes

    def capacity(self, slot_bytes: int) -> int:
        """Number of slots of this size if the whole arena were cut into them."""
        return (self.count - len(self._unavailable)) * (self.extent_bytes // slot_bytes)

    def most(self, slot_bytes: int) -> int:
        """The same if memory can be had for every extent."""
        return self.count * (self.extent_bytes // slot_bytes)

    def slot_bytes(self, slot: int) -> int | None:
        """The size of a slot; None if it does not exist at present."""
        extent, i = divmod(slot, self.stride)
        if slot < 0 or extent >= self.count or self.use[extent, i] == _NONE:
            return None
        size = self.class_of[extent]
        return size.slot_bytes if size else None

    def reserved_slots(self, slot_bytes: int) -> int:
        """Number of reserved slots of one size class."""
        size = self.classes.get(slot_bytes)
        return sum(self.reserved[extent] for extent in size.extents) if size else 0

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
        """The class of slots of this size; a new one has no extents yet."""
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
        """Unassign an extent without reserved and ready slots; it is assigned next."""
        self._withdraw(extent)
        if self.draining == extent:
            self.draining = None
        self._unassign(extent)
        self._new.discard(extent)
        self._unassigned.appendleft(extent)

    def drain(self, extent: int) -> None:
        """Hand out no slot of an extent any more."""
        self.draining = extent
        self._withdraw(extent)

    def adopt(self, extent: int, slot_bytes: int, slots: Iterable[int]) -> None:
        """Take an unassigned extent as a predecessor left it.

        Args:
            extent: number of the extent.
            slot_bytes: size of its slots, in bytes.
            slots: those that are reserved from now on; all others are free.
        """
        self._unassigned.remove(extent)
        self._new.discard(extent)
        size = self.size_class(slot_bytes)
        self._cut(size, extent)
        reserved = set(slots)
        size.free = deque(slot for slot in size.free if slot not in reserved)
        for slot in reserved:
            self._use[slot] = _RESERVED
        self.reserved[extent] = len(reserved)

    def mark_unavailable(self, extent: int) -> None:
        """There is no memory for an extent that was assigned just now.

        So there is none for other extents that never had memory: none of them is assigned until
        ``mark_available``.
        """
        self._withdraw(extent)
        self.use[extent] = _NONE
        self.reserved[extent] = 0
        self._unassign(extent)
        self._unavailable += [extent, *(other for other in self._unassigned if other in self._new)]
        self._unassigned = deque(other for other in self._unassigned if other not in self._new)

    def mark_available(self) -> None:
        """There may be memory again: unavailable extents may be assigned."""
        self._unassigned.extend(sorted(self._unavailable))
        self._unavailable.clear()

    def discard(self, size: SizeClass) -> None:
        """Forget a class if it has no extents."""
        if not size.extents:
            self.classes.pop(size.slot_bytes, None)

    # -- slots -----------------------------------------------------------------------------------

    def take(self, size: SizeClass, n: int) -> tuple[int, ...]:
        """Reserve up to ``n`` free slots."""
        slots = tuple(size.free.popleft() for _ in range(min(n, len(size.free))))
        for slot in slots:
            self._use[slot] = _RESERVED
            self.reserved[slot // self.stride] += 1
        return slots

    def mark_ready(self, slot: int) -> None:
        """A reserved slot holds a chunk now."""
        self._end_reservation(slot)
        self._use[slot] = _READY

    def free(self, slot: int) -> None:
        """A reserved slot is free again."""
        self._end_reservation(slot)
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

    # -- checking --------------------------------------------------------------------------------

    def validate(self) -> None:
        """Compare the tables with each other, for tests and simulations.

        Raises:
            AssertionError: they contradict each other; the text says how.
        """
        assigned = [extent for extent, size in enumerate(self.class_of) if size is not None]
        everywhere = [*assigned, *self._unassigned, *self._unavailable]
        assert sorted(everywhere) == list(range(self.count)), (
            f"extents {everywhere} are assigned, unassigned or unavailable, of {self.count}"
        )
        counted = np.count_nonzero(self.use == _RESERVED, axis=1).tolist()
        assert counted == self.reserved, f"reserved slots {counted}, counted {self.reserved}"
        idle = [extent for extent, size in enumerate(self.class_of) if size is None]
        assert not self.use[idle].any(), "slots of an unassigned extent are in use"
        free: list[int] = []
        for slot_bytes, size in self.classes.items():
            assert size.slot_bytes == slot_bytes, f"the class of {slot_bytes} has {size.slot_bytes}"
            owned = {extent for extent in assigned if self.class_of[extent] is size}
            assert owned == set(size.extents), f"class {slot_bytes}: {owned}, {size.extents}"
            beyond = self.use[size.extents, self.extent_bytes // slot_bytes :]
            assert not beyond.any(), f"slots of {slot_bytes} bytes are used beyond their extent"
            free += size.free
        known = np.flatnonzero(self._use == _FREE).tolist()
        assert sorted(free) == known, f"free slots: queues {sorted(free)}, table {known}"
        draining = self.draining
        assert draining is None or draining in assigned, f"unassigned extent {draining} is drained"

    # -- inside ----------------------------------------------------------------------------------

    def _end_reservation(self, slot: int) -> None:
        assert self._use[slot] == _RESERVED
        self.reserved[slot // self.stride] -= 1

    def _cut(self, size: SizeClass, extent: int) -> None:
        size.extents.append(extent)
        self.class_of[extent] = size
        count = self.extent_bytes // size.slot_bytes
        self.use[extent, :count] = _FREE
        first = extent * self.stride
        size.free.extend(range(first, first + count))

    def _unassign(self, extent: int) -> None:
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
