"""An arena in the memory of another process or host, which can be read but not mapped.

Says where to read, and what was read means; whoever reads does so twice: the keys' buckets of the
index; then the rows of the slots they name, and the slots. What is torn, stale or spilled leaves a
key unknown, or gives bytes that have not the checksum of its row; nothing worse, so the arena's
writer need not know of us. Chunks whose checksum was not noted are unknown, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena.format import SLOT, Geometry, is_readable, locate
from lmkv_ray.index import LANES, BucketIndex
from lmkv_ray.keys import KeyArray

Numbers = npt.NDArray[np.int64]

TAGS_BYTES, ROWS_BYTES = LANES * 8, LANES * 4
"""Of one bucket."""


@dataclass(frozen=True)
class DistantArena:
    """Where its tables are."""

    geometry: Geometry
    slot_bytes: Numbers
    """Size of the slots of each extent, int64[extents]; 0 where it cannot be read."""
    index: int
    """Addresses in the other process."""
    slots: int
    data: int

    def buckets(self, keys: KeyArray) -> tuple[Numbers, Numbers]:
        """First reading: addresses of tags (64 bytes) and of rows (32 bytes) for each key."""
        tags, rows = BucketIndex.homes(keys, self.geometry.slots)
        return self.index + tags, self.index + rows

    def slots_of(
        self, keys: KeyArray, tags: npt.NDArray[np.uint64], rows: npt.NDArray[np.uint32]
    ) -> Numbers:
        """What it said: slots of the keys, int64[n], or -1.

        Args:
            keys: uint64[n, 2].
            tags: [n, 8].
            rows: [n, 8].
        """
        slots = BucketIndex.rows_among(keys, tags, rows)
        exists, _, _ = locate(self.geometry, self.slot_bytes, slots)
        slots[~exists] = -1
        return slots

    def rows(self, slots: Numbers) -> Numbers:
        """Second reading: addresses of the rows (64 bytes) of slots."""
        return self.slots + slots * SLOT.itemsize

    def places(self, slots: Numbers) -> tuple[Numbers, Numbers]:
        """And where the slots begin in the data, and their sizes; anything where there is none."""
        _, offsets, sizes = locate(self.geometry, self.slot_bytes, slots)
        return offsets, sizes

    def holds(
        self, keys: KeyArray, slots: Numbers, rows: npt.NDArray[np.void]
    ) -> npt.NDArray[np.bool_]:
        """What it said: which of the slots hold their key's chunk, of the row's size and checksum.

        Key, generation and checksum are the first half of one cache line, and are read together: by
        hardware, and by a processor that copies 32 bytes at a time.

        Args:
            keys: uint64[n, 2].
            slots: int64[n], of ``slots_of``.
            rows: SLOT[n], anything where there is no slot.
        """
        here, _, sizes = locate(self.geometry, self.slot_bytes, slots)
        here &= is_readable(rows["generation"]) & (rows["key"] == keys).all(axis=1)
        here &= (rows["checksum"] != 0) & (rows["nbytes"] > 0) & (rows["nbytes"] <= sizes)
        return here
