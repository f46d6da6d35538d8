"""An arena of zeros for one copy and back: the self-test of layouts and engines."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lmkv_ray.transfer.base import Bytes, Generations, Ints


class ScratchArena:
    """One slot, number 0, in ordinary memory, that never changes its generation."""

    arena_id = -1
    grown = False

    def __init__(self, nbytes: int) -> None:
        self.data: Bytes = np.zeros(nbytes, np.uint8)
        self.extent_bytes = nbytes

    def offsets(self, slots: Ints, nbytes: int) -> Ints:
        """0 for slot 0."""
        return slots * len(self.data)

    def unchanged(self, slots: Ints, generations: Generations) -> npt.NDArray[np.bool_]:
        """All of them."""
        return np.ones(len(slots), np.bool_)

    def assigned(self) -> list[tuple[int, int]]:
        """Nothing: one copy is not worth registration for."""
        return []

    def populate(self) -> Iterator[int]:
        """Nothing to do."""
        return iter(())
