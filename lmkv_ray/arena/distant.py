"""An arena in the memory of another process or host, which can be read but not mapped.

Computes the addresses of a remote arena's tables, and decodes what an RDMA READ brought. A lookup
takes two READs: first the index buckets of the keys; then the rows of the slots that these name,
and the slots. Torn, stale or spilled data make a key unknown, or bring bytes that do not have the
checksum of the row: never wrong chunks. So the arena's writer need not know of its remote readers.
Chunks without a checksum are unknown as well.
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
"""Bytes of one bucket of the index."""


@dataclass(frozen=True)
class DistantArena:
    """Addresses of the tables of an arena, in the process that has mapped it."""

    geometry: Geometry
    slot_bytes: Numbers
    """Size of the slots of each extent, int64[extents]; 0 where it cannot be read."""
    index: int
    """Address of the index; ``slots``, ``data``: those of the slot table and the payloads."""
    slots: int
    data: int

    def buckets(self, keys: KeyArray) -> tuple[Numbers, Numbers]:
        """First READ: addresses of tags (64 bytes) and of rows (32 bytes) for each key."""
        tags, rows = BucketIndex.homes(keys, self.geometry.slots)
        return self.index + tags, self.index + rows

    def slots_of(
        self, keys: KeyArray, tags: npt.NDArray[np.uint64], rows: npt.NDArray[np.uint32]
    ) -> Numbers:
        """Decode the first READ: the slot of each key, int64[n]; -1 if the key was not found.

        Args:
            keys: those that were looked up, uint64[n, 2].
            tags: the tags that were read, uint64[n, 8].
            rows: the rows that were read, uint32[n, 8].
        """
        slots = BucketIndex.rows_among(keys, tags, rows)
        exists, _, _ = locate(self.geometry, self.slot_bytes, slots)
        slots[~exists] = -1
        return slots

    def rows(self, slots: Numbers) -> Numbers:
        """Second READ: addresses of the rows (64 bytes) of slots."""
        return self.slots + slots * SLOT.itemsize

    def places(self, slots: Numbers) -> tuple[Numbers, Numbers]:
        """Offsets in the data and sizes of slots, in bytes; any numbers where a slot is -1."""
        _, offsets, sizes = locate(self.geometry, self.slot_bytes, slots)
        return offsets, sizes

    def holds(
        self, keys: KeyArray, slots: Numbers, rows: npt.NDArray[np.void]
    ) -> npt.NDArray[np.bool_]:
        """Decode the second READ: which rows really hold the chunk of their key, with a checksum.

        Key, generation and checksum are the first half of one cache line, and are read together: by
        hardware, and by a processor that copies 32 bytes at a time.

        Args:
            keys: those that were looked up, uint64[n, 2].
            slots: what ``slots_of`` returned, int64[n].
            rows: the rows that were read, SLOT[n]; any bytes where the slot is -1.
        """
        here, _, sizes = locate(self.geometry, self.slot_bytes, slots)
        here &= is_readable(rows["generation"]) & (rows["key"] == keys).all(axis=1)
        here &= (rows["checksum"] != 0) & (rows["nbytes"] > 0) & (rows["nbytes"] <= sizes)
        return here
