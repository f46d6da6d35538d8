"""An arena without memory that refuses every instruction a real one could not obey."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lmkv_ray.messages import Owner
from lmkv_ray.shard import (
    AssignExtent,
    Free,
    Instruction,
    Publish,
    RecoveredSlot,
    Reserve,
    Retire,
    Spoil,
)

EXTENTS, EXTENT_BYTES, MIN_SLOT_BYTES = 5, 48, 8
STRIDE = EXTENT_BYTES // MIN_SLOT_BYTES


@dataclass
class FakeArena:
    sizes: list[int] = field(default_factory=lambda: [0] * EXTENTS)
    reserved: dict[int, Owner] = field(default_factory=dict)
    spoiled: set[int] = field(default_factory=set)
    ready: dict[int, RecoveredSlot] = field(default_factory=dict)
    content: dict[int, object] = field(default_factory=dict)
    """What was last written into a slot."""

    def apply(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case AssignExtent(extent, slot_bytes):
                    assert not any(self.extent(s) == extent for s in (*self.reserved, *self.ready))
                    self.sizes[extent] = slot_bytes
                case Reserve(slots, owner):
                    for slot in slots:
                        assert self.exists(slot)
                        assert slot not in self.reserved
                        assert slot not in self.ready
                        self.reserved[slot] = owner
                        self.spoiled.discard(slot)
                case Publish(slots, keys, nbytes, spaces):
                    for slot, key, size, space in zip(slots, keys, nbytes, spaces, strict=True):
                        del self.reserved[slot]
                        self.ready[slot] = RecoveredSlot(
                            slot=slot, key=key, space=space, nbytes=size
                        )
                case Retire(slots, _):
                    for slot in slots:
                        del self.ready[slot]
                case Spoil(slots):
                    assert self.reserved.keys() >= set(slots)
                    self.spoiled.update(slots)
                case Free(slots):
                    for slot in slots:
                        del self.reserved[slot]

    @staticmethod
    def extent(slot: int) -> int:
        return slot // STRIDE

    def exists(self, slot: int) -> bool:
        size = self.sizes[self.extent(slot)]
        return size > 0 and slot % STRIDE < EXTENT_BYTES // size

    def rows(self) -> list[RecoveredSlot]:
        reserved = [
            RecoveredSlot(slot=slot, key=None, owner=owner, spoiled=slot in self.spoiled)
            for slot, owner in self.reserved.items()
        ]
        return [*self.ready.values(), *reserved]

    def available(self, slot_bytes: int, without: int | None) -> int:
        """Slots of a size that could be had by evicting whatever may be evicted."""
        total = 0
        for extent, size in enumerate(self.sizes):
            pins = sum(self.extent(slot) == extent for slot in self.reserved)
            if extent == without and pins:
                continue
            if size == slot_bytes:
                total += EXTENT_BYTES // slot_bytes - pins
            elif not pins:
                total += EXTENT_BYTES // slot_bytes
        return total
