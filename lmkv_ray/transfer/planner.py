"""Which copies a job is: long contiguous runs go by plain copies, the rest through a ring.

A chunk lies in the arena in one piece, and in the engine's cache in as many as the layout and the
block ids make. Where these are long (all layers of a block side by side; or neighbouring blocks of
one layer in neighbouring pieces), each is one plain copy between cache and arena. Where they are
short, a kernel gathers them in a slot of the ring, or scatters them from there, and the arena sees
one copy a chunk. Which of the two is decided chunk by chunk.

Everything is computed on whole arrays: a job of 2,000 chunks is planned in a millisecond or two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lmkv_ray.layout import ChunkLayout
from lmkv_ray.transfer.base import Ints
from lmkv_ray.transfer.plan import Copies, CopyPlan, Pieces

Bools = npt.NDArray[np.bool_]

_ALIGN = 256
"""Chunks in a ring slot begin at multiples of it: accesses of the kernel are wide then."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """A part of a chunk that fits a ring slot: blocks ``first`` to ``end`` of runs."""

    runs: range
    first: int
    end: int
    begin: int
    """First byte in the chunk."""
    nbytes: int

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Bounds of its blocks and runs."""
        return self.first, self.end, self.runs.start, self.runs.stop


class Planner:
    """Plans the jobs of one KV group.

    Args:
        layout: of the group's chunks.
        slot_bytes: size of one slot of the ring; 0: there is none.
        direct_bytes: chunks in pieces of this mean size or more are copied without the ring.
    """

    def __init__(self, layout: ChunkLayout, *, slot_bytes: int, direct_bytes: int) -> None:
        self._layout = layout
        self._slot_bytes = slot_bytes
        runs = layout.runs
        self._offset = np.array([run.offset for run in runs], np.int64)
        self._stride = np.array([run.stride for run in runs], np.int64)
        self._nbytes = np.array([run.nbytes for run in runs], np.int64)
        self._start = np.array(layout.run_offsets(), np.int64)
        table = np.stack([self._start, self._offset, self._stride, self._nbytes])
        dense = self._stride == self._nbytes
        self._dense, self._sparse = table[:, dense], table[:, ~dense]
        page = int(self._nbytes.max(initial=0))
        self._direct_bytes = 0 if page > slot_bytes else direct_bytes
        self._block_bytes, self._chunk_bytes = layout.block_bytes, layout.chunk_bytes
        self._pitch = -(-self._chunk_bytes // _ALIGN) * _ALIGN
        self._tiles = [] if page > slot_bytes else self._cut()

    @property
    def chunk_bytes(self) -> int:
        """Of one chunk of the group."""
        return self._chunk_bytes

    @property
    def targets(self) -> int:
        """Blocks in the largest batch."""
        return max(1, self._slot_bytes // self._pitch) * self._layout.blocks

    def plan(
        self, chunks: Ints, blocks: Ints, *, skip: int, arena_bytes: int, extent_bytes: int
    ) -> CopyPlan:
        """The copies between chunks and blocks.

        Args:
            chunks: byte offset of each chunk in the arena, int64[n].
            blocks: block ids in order, int64[m]; there may be fewer than the chunks hold.
            skip: leading blocks of the first chunk that are left out.
            arena_bytes: size of the arena.
            extent_bytes: no copy crosses a multiple of it, where another extent begins.

        Raises:
            IndexError: a block or a chunk lies outside its memory.
        """
        per_chunk = self._layout.blocks
        count = -(-(len(blocks) + skip) // per_chunk) if len(blocks) else 0
        self._check(chunks, blocks, skip, count, arena_bytes)
        chunks = chunks[:count]
        if not count:
            return self._pack((), chunks, chunks, chunks, blocks, blocks)
        # Of each chunk: its first block in ``blocks``, and how many of its own are wanted.
        first = np.arange(count + 1, dtype=np.int64) * per_chunk - skip
        first[0], first[-1] = 0, len(blocks)
        wanted = np.diff(first)
        number = np.repeat(np.arange(count), wanted)
        index = np.arange(skip, skip + len(blocks), dtype=np.int64) - number * per_chunk
        joined = np.empty(len(blocks), np.bool_)
        np.equal(np.diff(blocks), 1, out=joined[1:])
        joined[first[:-1]] &= self._near(chunks, extent_bytes)
        direct = self._is_direct(wanted, joined, first[:-1])
        low = np.zeros(count, np.int64)
        low[0] = skip
        plain: tuple[Pieces, ...] = ()
        if direct.any():
            mine = direct[number]
            # A piece must not begin in a packed chunk.
            joined[1:] &= mine[:-1]
            plain = self._pieces(chunks[number[mine]], index[mine], blocks[mine], joined[mine])
            index, blocks = index[~mine], blocks[~mine]
            chunks, low, wanted = chunks[~direct], low[~direct], wanted[~direct]
        return self._pack(plain, chunks, low, wanted, index, blocks)

    # -- which way ------------------------------------------------------------------------------

    def _is_direct(self, wanted: Ints, joined: Bools, first: Ints) -> Bools:
        """bool[chunks]: whether a chunk's pieces are long enough, on the mean, for plain copies."""
        if not self._direct_bytes:
            return np.ones(len(wanted), np.bool_)
        pieces = self._dense.shape[1] * np.add.reduceat(~joined, first, dtype=np.int64)
        pieces += self._sparse.shape[1] * wanted
        long: Bools = wanted * self._block_bytes >= self._direct_bytes * pieces
        return long

    def _near(self, chunks: Ints, extent_bytes: int) -> Bools:
        """bool[chunks]: whether a chunk's bytes go on where those of the one before it end."""
        near = np.zeros(len(chunks), np.bool_)
        if len(self._layout.runs) == 1:
            extents = chunks // extent_bytes
            near[1:] = np.diff(chunks) == self._chunk_bytes
            near[1:] &= extents[1:] == extents[:-1]
        return near

    def _pieces(self, chunks: Ints, index: Ints, blocks: Ints, joined: Bools) -> tuple[Pieces, ...]:
        """Plain copies of blocks, those that are joined to their predecessor with it."""
        found = []
        if self._dense.size:
            at = np.flatnonzero(~joined)
            counts = np.diff(at, append=len(joined))
            found.append(Pieces(chunks[at], index[at], blocks[at], counts, self._dense))
        if self._sparse.size:
            found.append(Pieces(chunks, index, blocks, np.ones_like(blocks), self._sparse))
        return tuple(found)

    # -- through the ring -----------------------------------------------------------------------

    def _pack(
        self,
        plain: tuple[Pieces, ...],
        chunks: Ints,
        low: Ints,
        wanted: Ints,
        index: Ints,
        blocks: Ints,
    ) -> CopyPlan:
        """Batches for packed chunks, of which blocks ``low`` to ``low + wanted`` are wanted."""
        if not len(chunks):
            none = np.empty(0, np.int64)
            empty = Copies(none, none, none)
            return CopyPlan(plain, none, none, none, empty, np.empty((0, 7), np.int64))
        count, tiles = len(chunks), self._tiles
        if len(tiles) == 1:  # whole chunks, several in a slot
            per_slot = max(1, self._slot_bytes // self._pitch)
            begin = np.arange(0, count, per_slot)
            end = np.minimum(begin + per_slot, count)
            at = np.arange(count) % per_slot * self._pitch
        else:  # parts of a chunk, each in a slot of its own
            begin = np.arange(count)
            end, at = begin + 1, np.zeros(count, np.int64)
        packed, ends = self._copies_of_slots(chunks, low, low + wanted, at)
        first = np.concatenate([[0], np.cumsum(wanted)])
        columns = np.array([(*tile.bounds, -tile.begin) for tile in tiles], np.int64)
        tile_first, tile_end, *runs, back = columns.T
        # Chunk by chunk, so that a chunk that is lost while it is copied costs few others.
        table = np.empty((len(begin), len(tiles), 7), np.int64)
        for column, chunk, bound in ((0, begin, tile_first), (1, end - 1, tile_end)):
            wanted_here, low_here = wanted[chunk, None], low[chunk, None]
            table[:, :, column] = first[chunk, None] + np.clip(bound - low_here, 0, wanted_here)
        table[:, :, 2], table[:, :, 3], table[:, :, 6] = *runs, back
        table[:, :, 4], table[:, :, 5] = ends[begin, :-1], ends[end - 1, 1:]
        rows = table.reshape(-1, 7)
        rows = rows[rows[:, 0] < rows[:, 1]]
        return CopyPlan(plain, np.repeat(at, wanted), index, blocks, packed, rows)

    def _copies_of_slots(
        self, chunks: Ints, low: Ints, high: Ints, at: Ints
    ) -> tuple[Copies, Ints]:
        """Copies between arena and slots, chunk by chunk, of each its tiles.

        Returns:
            the copies, and where those of tile t of chunk c begin and end among them:
            ``[c, t]`` and ``[c, t + 1]``; int64[chunks, tiles + 1].
        """
        tiles = self._tiles
        shape = (len(chunks), len(tiles))
        begin = np.array([tile.begin for tile in tiles])
        parts = Copies(
            (chunks[:, None] + begin).ravel(),
            np.repeat(at, len(tiles)),
            np.tile([tile.nbytes for tile in tiles], len(chunks)),
        )
        counts = np.ones(shape, np.int64)
        # Only the first and the last chunk of a job can be wanted in part.
        for chunk in np.flatnonzero((low > 0) | (high < self._layout.blocks))[::-1].tolist():
            those = [self._partly(t, int(low[chunk]), int(high[chunk])) for t in tiles]
            counts[chunk] = [len(begins) for begins, _ in those]
            begins, sizes = (np.concatenate(column) for column in zip(*those, strict=True))
            tile_begin = np.repeat(begin, counts[chunk])
            mine = Copies(chunks[chunk] + begins, at[chunk] + begins - tile_begin, sizes)
            parts = parts.replaced(chunk * len(tiles), (chunk + 1) * len(tiles), mine)
        ends = np.concatenate([[0], np.cumsum(counts)])
        return parts, ends[np.arange(shape[0])[:, None] * shape[1] + np.arange(shape[1] + 1)]

    def _partly(self, tile: _Tile, low: int, high: int) -> tuple[Ints, Ints]:
        """What is wanted of a tile, if only blocks ``low`` to ``high`` of its chunk are.

        Returns:
            where in the chunk copies begin, and their sizes: one, or one a run, or none.
        """
        if low <= tile.first and high >= tile.end:
            return np.array([tile.begin]), np.array([tile.nbytes])
        runs = slice(tile.runs.start, tile.runs.stop)
        from_, to = max(low, tile.first), min(high, tile.end)
        if from_ >= to:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        sizes = self._nbytes[runs]
        return self._start[runs] + from_ * sizes, (to - from_) * sizes

    def _cut(self) -> list[_Tile]:
        """Cut a chunk into tiles: whole, or some runs, or some blocks of one run."""
        blocks, tiles, run = self._layout.blocks, [], 0
        sizes = (self._nbytes * blocks).tolist()
        while run < len(sizes):
            begin, end, total = int(self._start[run]), run, 0
            while end < len(sizes) and total + sizes[end] <= self._slot_bytes:
                total += sizes[end]
                end += 1
            if end > run:
                tiles.append(_Tile(range(run, end), 0, blocks, begin, total))
                run = end
                continue
            nbytes = int(self._nbytes[run])
            step = self._slot_bytes // nbytes
            for first in range(0, blocks, step):
                count = min(step, blocks - first)
                tile = _Tile(range(run, run + 1), first, first + count, begin + first * nbytes, 0)
                tiles.append(replace(tile, nbytes=count * nbytes))
            run += 1
        return tiles

    def _check(self, chunks: Ints, blocks: Ints, skip: int, count: int, arena_bytes: int) -> None:
        layout = self._layout
        if not 0 <= skip < layout.blocks or count > len(chunks):
            raise IndexError(
                f"{len(blocks)} blocks after {skip} in {len(chunks)} chunks of {layout.blocks}"
            )
        if not len(blocks):
            return
        if blocks.min() < 0 or blocks.max() >= layout.num_blocks:
            raise IndexError(f"block ids {blocks.min()}..{blocks.max()} of {layout.num_blocks}")
        if chunks.min() < 0 or chunks.max() + self._chunk_bytes > arena_bytes:
            raise IndexError(f"chunk at {chunks.max()} of an arena of {arena_bytes} bytes")
