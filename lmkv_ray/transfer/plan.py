"""What a job is cut into: plain copies, and batches that pass through the ring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lmkv_ray.transfer.base import Ints


@dataclass(frozen=True, slots=True)
class Copies:
    """Plain copies, three int64[n]: ``nbytes`` between ``arena`` and ``other``, in bytes."""

    arena: Ints
    other: Ints
    """Offset in the engine's cache, or in a ring slot."""
    nbytes: Ints

    def __len__(self) -> int:
        return len(self.arena)

    def part(self, first: int, end: int) -> Copies:
        """Copies ``first`` to ``end``."""
        return Copies(self.arena[first:end], self.other[first:end], self.nbytes[first:end])

    def replaced(self, first: int, end: int, others: Copies) -> Copies:
        """With others in place of copies ``first`` to ``end``."""
        three = self.part(0, first), others, self.part(end, len(self))
        columns = ("arena", "other", "nbytes")
        return Copies(*(np.concatenate([getattr(c, name) for c in three]) for name in columns))


@dataclass(frozen=True, slots=True)
class CopyBatch:
    """What passes through one ring slot: some runs of some blocks, and the copies of the slot.

    ``chunks``, ``indices``, ``blocks`` and ``runs`` are what ``PageTable.write`` takes.
    """

    chunks: Ints
    indices: Ints
    blocks: Ints
    runs: range
    copies: Copies


@dataclass(frozen=True, slots=True)
class Pieces:
    """Plain copies between arena and cache, not yet written out: each piece for each run.

    A piece is ``counts`` blocks from ``blocks`` on, that lie side by side on both sides.
    """

    chunks: Ints
    indices: Ints
    blocks: Ints
    counts: Ints
    runs: Ints
    """int64[4, runs]: start in a chunk, offset and stride in the cache, size."""

    def __len__(self) -> int:
        return len(self.chunks)

    def copies(self, first: int, end: int) -> Copies:
        """Pieces ``first`` to ``end`` of all runs."""
        start, offset, stride, nbytes = self.runs
        mine = slice(first, end)
        arena = start + self.indices[mine, None] * nbytes
        arena += self.chunks[mine, None]
        cache = offset + self.blocks[mine, None] * stride
        return Copies(arena.ravel(), cache.ravel(), (self.counts[mine, None] * nbytes).ravel())


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """The copies of one job; ``plain()`` and ``batches()`` in any order."""

    direct: tuple[Pieces, ...]
    """Between cache and arena."""
    chunks: Ints
    """Of all packed blocks: where their chunk begins in the ring slot."""
    indices: Ints
    blocks: Ints
    packed: Copies
    """Between ring slots and arena."""
    rows: Ints
    """One row a batch: first and end of its blocks, runs and packed copies; and what is added to
    its ``chunks``; int64[n, 7]."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to copy."""
        return not len(self.rows) and not any(map(len, self.direct))

    def plain_steps(self, most: int) -> int:
        """How many ``plain(most)`` yields."""
        return sum(-(-len(p) // max(1, most // p.runs.shape[1])) for p in self.direct)

    def plain(self, most: int) -> Iterator[Copies]:
        """The copies between cache and arena, about ``most`` at a time."""
        for pieces in self.direct:
            step = max(1, most // pieces.runs.shape[1])
            for first in range(0, len(pieces), step):
                yield pieces.copies(first, first + step)

    def batches(self) -> Iterator[CopyBatch]:
        """The batches in order; each is to pass through a ring slot of its own."""
        for block, end_block, run, end_run, copy, end_copy, shift in self.rows.tolist():
            yield CopyBatch(
                self.chunks[block:end_block] + shift,
                self.indices[block:end_block],
                self.blocks[block:end_block],
                range(run, end_run),
                self.packed.part(copy, end_copy),
            )
