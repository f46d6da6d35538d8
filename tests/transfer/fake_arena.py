"""An arena in ordinary memory whose slots can be lost at will."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lmkv_ray.transfer.base import Bytes, Generations, Ints


class FakeArena:
    """``slots`` slots of ``slot_bytes``, in the order ``order`` (slot i lies at position
    order[i]).
    """

    def __init__(
        self, slots: int, slot_bytes: int, *, arena_id: int = 1, order: Ints | None = None
    ) -> None:
        self.arena_id = arena_id
        self.slot_bytes = slot_bytes
        self.order = np.arange(slots) if order is None else np.asarray(order, np.int64)
        self.data: Bytes = np.zeros(slots * slot_bytes, np.uint8)
        self.generations: Generations = np.zeros(slots, np.uint64)
        self.extent_bytes = len(self.data)
        self.populated = 0
        self.grown = False

    def offsets(self, slots: Ints, nbytes: int) -> Ints:
        assert nbytes <= self.slot_bytes
        return self.order[slots] * self.slot_bytes

    def unchanged(self, slots: Ints, generations: Generations) -> npt.NDArray[np.bool_]:
        same: npt.NDArray[np.bool_] = self.generations[slots] == generations
        return same

    def assigned(self) -> list[tuple[int, int]]:
        return [(0, len(self.data))]

    def populate(self) -> Iterator[int]:
        self.grown = False
        self.populated += 1
        yield len(self.data)

    def slot(self, slot: int) -> Bytes:
        at = int(self.order[slot]) * self.slot_bytes
        return self.data[at : at + self.slot_bytes]
