"""Key -> row, in any buffer: one writer, lock-free readers in other processes.

The table is an array of buckets with eight lanes each, so that looking up many keys is one gather
of one cache line a key. A key's *home* bucket comes from the top bits of its 64-bit tag; a key
whose home is full *spills* into one of the next buckets, and the home counts how many of its keys
did. Only while that count is not zero do readers probe on, so removing a key never hides another,
and lookups of missing keys stay one gather as well.

The index is a hint. It knows tags, not keys: two keys with one tag (one pair in 2**64) are the same
key to it, so readers verify the whole key in the row they were sent to. A reader that races the
writer may miss a key that is there, or be sent to a row that holds another key by now; it can not
crash or loop, as rows come from the table or nowhere and probes are bounded. The writer stores
a row before its tag and clears the tag first.

    layout     tags uint64[buckets, 8] | rows uint32[buckets, 8] | spilled uint8[buckets]
"""

from __future__ import annotations

from mmap import mmap

import numpy as np
import numpy.typing as npt

from lmkv_ray.keys import KeyArray

LANES = 8
PROBES = 8
"""Buckets a key can be in: its home and the next seven."""
MAX_LOAD = 0.4
"""Part of the lanes in use at capacity: about one key in 300 spills then, and none is refused."""

_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64)

Buffer = bytes | bytearray | memoryview | mmap | npt.NDArray[np.uint8]
Tags = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]


def key_tags(keys: KeyArray) -> Tags:
    """64-bit tags of keys, never 0; their top bits are well mixed whatever the keys are."""
    tags: Tags = (keys[:, 0] ^ (keys[:, 1] * _MULTIPLIERS[1])) * _MULTIPLIERS[0]
    return np.maximum(tags, 1, out=tags)


class BucketIndex:
    """A map of keys to rows (below 2**32) in a buffer that the caller owns.

    Args:
        buffer: at least ``nbytes(capacity)`` bytes, 8-byte aligned. Zeroed memory is an empty
            index. A read-only buffer makes a read-only index.
        capacity: how many keys it is made for. A few more fit.
    """

    def __init__(self, buffer: Buffer, capacity: int) -> None:
        buckets = _buckets(capacity)
        lanes = buckets * LANES
        self._tags = np.frombuffer(buffer, np.uint64, lanes)
        self._rows = np.frombuffer(buffer, np.uint32, lanes, lanes * 8)
        self._spilled = np.frombuffer(buffer, np.uint8, buckets, lanes * 12)
        self._buckets = self._tags.reshape(buckets, LANES)
        self._mask = buckets - 1
        self._shift = _shift(buckets)

    @staticmethod
    def nbytes(capacity: int) -> int:
        """Bytes of an index for ``capacity`` keys (30 to 61 a key)."""
        return _buckets(capacity) * (LANES * 12 + 1)

    def __len__(self) -> int:
        """Keys in the index; counts them (O(capacity))."""
        return int(np.count_nonzero(self._tags))

    def lookup(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Rows of keys, int64[n]; -1 where the index does not know the key."""
        found = self._find(key_tags(keys))
        rows: npt.NDArray[np.int64] = self._rows.take(found, mode="clip").astype(np.int64)
        rows[found < 0] = -1
        return rows

    def insert(self, keys: KeyArray, rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Enter keys, or move them to new rows; of equal keys in the batch the last one counts.

        Returns:
            bool[n]: False where a key found no free lane and is not in the index. With hashed keys
            that takes far more than ``capacity`` keys.
        """
        tags = key_tags(keys)
        values = np.ascontiguousarray(rows, np.uint32)
        # Sorting by tag brings equal tags together, and keys of one home too.
        order = np.argsort(tags, kind="stable")
        sorted_tags = tags[order]
        last = np.ones(len(order), np.bool_)
        last[:-1] = sorted_tags[1:] != sorted_tags[:-1]
        order, sorted_tags = order[last], sorted_tags[last]

        found = self._find(sorted_tags)
        known = found >= 0
        self._rows[found[known]] = values[order[known]]

        tags_left, values_left = sorted_tags[~known], values[order[~known]]
        for distance in range(PROBES):
            if not len(tags_left):
                break
            placed = self._place(tags_left, values_left, distance)
            tags_left, values_left = tags_left[~placed], values_left[~placed]
        return np.isin(tags, tags_left, invert=True) if len(tags_left) else np.ones(len(tags), bool)

    def remove(self, keys: KeyArray) -> None:
        """Forget keys; unknown ones are ignored."""
        tags = key_tags(keys)
        found = self._find(tags)
        found, first = np.unique(found, return_index=True)
        tags, found = tags[first[found >= 0]], found[found >= 0]
        self._tags[found] = 0
        homes = self._homes(tags)
        np.subtract.at(self._spilled, homes[homes != found // LANES], 1)

    def clear(self) -> None:
        """Forget all keys."""
        self._tags[:] = 0
        self._spilled[:] = 0

    def _homes(self, tags: Tags) -> Positions:
        return (tags >> self._shift).astype(np.int64)

    def _find(self, tags: Tags) -> Positions:
        """Lanes (counted over the whole table) that hold the tags, -1 where none does."""
        homes = self._homes(tags)
        equal = self._buckets.take(homes, axis=0) == tags[:, None]
        # Eight booleans, read as one integer: its lowest set bit says which lane is the first.
        bits = equal.view(np.uint64).ravel()
        lanes = np.bitwise_count((bits & (~bits + np.uint64(1))) - np.uint64(1)) >> 3
        found: Positions = homes * LANES + lanes
        missing = np.flatnonzero(bits == 0)
        if len(missing):
            found[missing] = -1
            spilled = missing[self._spilled.take(homes[missing]) > 0]
            if len(spilled):
                found[spilled] = self._find_spilled(tags[spilled], homes[spilled])
        return found

    def _find_spilled(self, tags: Tags, homes: Positions) -> Positions:
        buckets = (homes[:, None] + np.arange(1, PROBES)) & self._mask
        equal = (self._buckets[buckets] == tags[:, None, None]).reshape(len(tags), -1)
        lane = equal.argmax(axis=1)
        bucket = buckets[np.arange(len(tags)), lane // LANES]
        return np.where(equal.any(axis=1), bucket * LANES + lane % LANES, -1)

    def _place(
        self, tags: Tags, rows: npt.NDArray[np.uint32], distance: int
    ) -> npt.NDArray[np.bool_]:
        """Put new tags into free lanes ``distance`` buckets from home; says which found one.

        ``tags`` are sorted, so that the keys of one bucket follow each other: the i-th of them
        takes the bucket's i-th free lane, and no two want the same.
        """
        homes = self._homes(tags)
        starts = np.flatnonzero(np.diff(homes, prepend=-1))
        rank = np.arange(len(tags)) - np.repeat(starts, np.diff(starts, append=len(tags)))
        buckets = (homes + distance) & self._mask
        free = self._buckets.take(buckets, axis=0) == 0
        wanted = free & (np.cumsum(free, axis=1, dtype=np.int64) == rank[:, None] + 1)
        placed: npt.NDArray[np.bool_] = wanted.any(axis=1)
        lanes = (buckets * LANES + wanted.argmax(axis=1))[placed]
        self._rows[lanes] = rows[placed]
        self._tags[lanes] = tags[placed]
        if distance:
            np.add.at(self._spilled, homes[placed], 1)
        return placed


def _buckets(capacity: int) -> int:
    wanted = max(capacity / (LANES * MAX_LOAD), PROBES)
    return 1 << int(np.ceil(np.log2(wanted)))


def _shift(buckets: int) -> np.uint64:
    return np.uint64(64 - buckets.bit_length() + 1)
