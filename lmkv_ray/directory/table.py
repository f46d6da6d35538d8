"""Chunk key -> up to four nodes, in arrays of a fixed size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmkv_ray.index import BucketIndex
from lmkv_ray.keys import KeyArray

HOLDERS = 4
"""Nodes remembered per chunk. The newest: they will keep it longest."""
NO_NODE = 0xFFFF
SWEEP = 1 << 16
"""Rows that are swept at a time: about a millisecond."""

Nodes = npt.NDArray[np.uint16]
Rows = npt.NDArray[np.int64]


class ChunkTable:
    """A bounded, vectorised multimap of chunks to node numbers (0 to 65534).

    When it is full, the rows that were filled longest ago make room. A node's number is *retired*
    in no time: lookups do not find its chunks any more, and ``sweep`` removes them in small steps.

    Args:
        capacity: chunks it can hold; about 77 bytes each.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        buffer = np.zeros(BucketIndex.nbytes(capacity), dtype=np.uint8)
        self._index = BucketIndex(buffer, capacity)
        self._keys: KeyArray = np.zeros((capacity, 2), dtype=np.uint64)
        self._holders: Nodes = np.full((capacity, HOLDERS), NO_NODE, dtype=np.uint16)
        self._freed = np.zeros(capacity, dtype=np.uint32)  # a stack of rows that became empty
        self._n_freed = 0
        self._hand = 0  # rows are first used, and later overwritten, in this order
        self._wrapped = False
        self._counts = np.zeros(NO_NODE + 1, dtype=np.int64)
        self._retired = np.zeros(NO_NODE + 1, dtype=np.bool_)
        self._unswept: dict[int, int] = {}  # retired number -> rows that may still name it
        self._broom = 0
        self.nbytes = buffer.nbytes + self._keys.nbytes + self._holders.nbytes + self._freed.nbytes
        """Bytes of all arrays that grow with the capacity."""
        self.overwritten = 0
        """Chunks that were forgotten because the table was full."""

    def __len__(self) -> int:
        """Chunks that at least one node holds, or held that is not swept yet."""
        return (self.capacity if self._wrapped else self._hand) - self._n_freed

    def count(self, node: int) -> int:
        """Chunks that are known to be on a node."""
        return 0 if self._retired[node] else int(self._counts[node])

    def counts(self, nodes: Nodes) -> npt.NDArray[np.int64]:
        """The same of many nodes, none of them retired."""
        return self._counts[nodes]

    def lookup(self, keys: KeyArray) -> Nodes:
        """Holders of each key, shape (n, 4), ``NO_NODE`` where there are fewer."""
        rows = self._rows(keys)
        holders: Nodes = self._holders[rows]
        holders[rows < 0] = NO_NODE
        if self._unswept:
            holders[self._retired[holders]] = NO_NODE
        return holders

    def add(self, keys: KeyArray, node: int, instead_of: int = NO_NODE) -> None:
        """The node holds these chunks now.

        Args:
            keys: 16 bytes each, naming the chunks.
            node: its number.
            instead_of: another number of the same node, which does not hold them now.
        """
        # Batches above the capacity would overwrite their own rows: the last part counts.
        keys = _distinct(keys)[-self.capacity :]
        rows = self._rows(keys)
        unknown = rows < 0
        if unknown.any():
            rows[unknown] = self._insert(keys[unknown])
            # Taking rows for the new may have overwritten known ones of this very batch.
            rows = rows[(rows >= 0) & (self._keys[rows] == keys).all(axis=1)]
        holders = self._holders[rows]
        if self._unswept or instead_of != NO_NODE:
            stale = self._retired[holders] | ((holders == instead_of) & (holders != NO_NODE))
            np.subtract.at(self._counts, holders[stale], 1)
            holders[stale] = NO_NODE
            self._holders[rows] = holders
        fresh = (holders != node).all(axis=1)
        rows, holders = rows[fresh], holders[fresh]
        free = holders == NO_NODE
        full = ~free.any(axis=1)
        np.subtract.at(self._counts, holders[full, 0], 1)
        holders[full, :-1] = holders[full, 1:]
        column = np.where(full, HOLDERS - 1, free.argmax(axis=1))
        holders[np.arange(len(rows)), column] = node
        self._holders[rows] = holders
        self._counts[node] += len(rows)

    def remove(self, keys: KeyArray, node: int) -> None:
        """The node does not hold these chunks any more."""
        rows = np.unique(self._rows(keys))
        rows = rows[rows >= 0]
        holders = self._holders[rows]
        mine = holders == node
        self._counts[node] -= int(mine.sum())
        holders[mine] = NO_NODE
        self._holders[rows] = holders
        self._forget(rows[mine.any(axis=1) & (holders == NO_NODE).all(axis=1)])

    def retire(self, node: int) -> None:
        """The node holds nothing any more. Its number can be used again once it is swept."""
        if self._counts[node]:
            self._retired[node] = True
            self._unswept[node] = self.capacity

    def is_retired(self, node: int) -> bool:
        """Whether there may be rows that still name this number, which is retired."""
        return node in self._unswept

    def sweep(self, rows: int = SWEEP) -> None:
        """Remove what retired numbers left in the next ``rows`` rows."""
        if not self._unswept:
            return
        first, self._broom = self._broom, min(self._broom + rows, self.capacity)
        swept = np.arange(first, self._broom, dtype=np.int64)
        holders = self._holders[first : self._broom]
        gone = self._retired[holders]
        touched = gone.any(axis=1)
        np.subtract.at(self._counts, holders[gone], 1)
        holders[gone] = NO_NODE
        self._forget(swept[touched & (holders == NO_NODE).all(axis=1)])
        if self._broom == self.capacity:
            self._broom = 0
        for node in [*self._unswept]:
            self._unswept[node] -= len(swept)
            if self._unswept[node] <= 0:
                del self._unswept[node]
                self._retired[node] = False

    def numbers(self) -> set[int]:
        """Numbers that hold chunks and are not retired."""
        holding = np.flatnonzero(self._counts)
        return set(holding[~self._retired[holding]].tolist())

    def validate(self) -> None:
        """Compare rows, index and counts with each other, for tests and simulations.

        Raises:
            AssertionError: something does not hold; the text says what.
        """
        present = self._holders != NO_NODE
        counted = np.bincount(self._holders[present], minlength=1)
        known = self._counts[: len(counted)]
        wrong = np.flatnonzero(counted != known).tolist()
        assert not wrong, f"numbers {wrong} are in {counted[wrong]} rows, not {known[wrong]}"
        assert not self._counts[len(counted) :].any(), "numbers that are in no row are counted"
        used = np.flatnonzero(present.any(axis=1))
        assert len(used) == len(self), f"{len(used)} rows are used, counted {len(self)}"
        assert len(self._index) == len(used), f"{len(self._index)} keys for {len(used)} rows"
        assert (self._rows(self._keys[used]) == used).all(), "a key does not lead to its row"
        freed = self._freed[: self._n_freed]
        assert len(np.unique(freed)) == len(freed), "a row is free twice"
        assert not present[freed].any(), "a free row has holders"
        retired = set(np.flatnonzero(self._retired).tolist())
        assert retired == self._unswept.keys(), f"{retired} are retired, {self._unswept} unswept"

    def _rows(self, keys: KeyArray) -> Rows:
        """Rows of keys, -1 where unknown; the index knows tags only, so whole keys are compared."""
        rows = self._index.lookup(keys)
        rows[(self._keys[rows] != keys).any(axis=1)] = -1
        return rows

    def _forget(self, rows: Rows) -> None:
        """These rows have no holder (any more): they can be used again."""
        self._index.remove(self._keys[rows])
        self._keys[rows] = 0
        self._freed[self._n_freed : self._n_freed + len(rows)] = rows
        self._n_freed += len(rows)

    def _insert(self, keys: KeyArray) -> Rows:
        """New rows for unknown, distinct keys; -1 for a key the index could not take."""
        rows = self._take_rows(len(keys))
        self._keys[rows] = keys
        placed = self._index.insert(keys, rows)
        found = self._index.lookup(keys) == rows
        if not found.all():
            # No free lane, or two keys with one tag: give the row back, the key stays unknown.
            lost = rows[~found]
            self._keys[lost] = 0
            self._freed[self._n_freed : self._n_freed + len(lost)] = lost
            self._n_freed += len(lost)
            rows[~(found & placed)] = -1
        return rows

    def _take_rows(self, n: int) -> Rows:
        freed = min(n, self._n_freed)
        self._n_freed -= freed
        rows = [self._freed[self._n_freed : self._n_freed + freed].astype(np.int64)]
        while (n := n - len(rows[-1])) > 0:
            chunk = np.arange(self._hand, min(self._hand + n, self.capacity), dtype=np.int64)
            self._hand += len(chunk)
            if self._wrapped:
                chunk = chunk[~np.isin(chunk, rows[0])]  # those were free, and are taken just now
                self._overwrite(chunk)
            if self._hand == self.capacity:
                self._hand, self._wrapped = 0, True
            rows.append(chunk)
        return np.concatenate(rows)

    def _overwrite(self, rows: Rows) -> None:
        holders = self._holders[rows]
        np.subtract.at(self._counts, holders[holders != NO_NODE], 1)
        self._index.remove(self._keys[rows])
        self._holders[rows] = NO_NODE
        self.overwritten += len(rows)


def _distinct(keys: KeyArray) -> KeyArray:
    """Keys without repetitions, order kept where there were none."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    first = np.ones(len(keys), dtype=np.bool_)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return keys if first.all() else keys[np.sort(order[first])]
