"""Copying chunks between the arena and an engine's pages in host memory.

Chunks are saved in order into slots granted in order, and vLLM hands out blocks in ascending or
descending runs. ``plan_copies`` finds these runs, so that a whole prompt is a few strided copies
per layer and not one copy per (block, layer); each is one NumPy assignment, made without the GIL.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from lmkv_ray.layout import ChunkLayout
from lmkv_ray.transfer.base import Bytes
from lmkv_ray.transfer.targets import BlockTargets


@dataclass(frozen=True, slots=True)
class CopyRun:
    """``count`` blocks in arithmetic progression.

    The i-th block is block ``block + i * block_step`` of the engine and number
    ``index + i * index_step`` of the chunk at ``chunk + i * chunk_step`` (bytes in the arena).
    """

    count: int
    chunk: int
    chunk_step: int
    index: int
    index_step: int
    block: int
    block_step: int


def plan_copies(targets: BlockTargets) -> list[CopyRun]:
    """Cut the blocks into maximal arithmetic progressions, greedily from the left."""
    rows = np.stack([targets.chunks, targets.indices, targets.blocks], axis=1)
    steps = np.diff(rows, axis=0)
    changes = np.any(steps[1:] != steps[:-1], axis=1).tolist()
    values, deltas = rows.tolist(), steps.tolist()
    runs, start, n = [], 0, len(values)
    while start < n:
        end = start + 1
        while end < n and (end == start + 1 or not changes[end - 2]):
            end += 1
        chunk, index, block = values[start]
        chunk_step, index_step, block_step = deltas[start] if end > start + 1 else (0, 0, 0)
        runs.append(CopyRun(end - start, chunk, chunk_step, index, index_step, block, block_step))
        start = end
    return runs


class HostCopier:
    """Copies blocks between an arena and an engine's cache, both in this process's memory.

    Args:
        layout: of the engine's chunks.
        cache: the engine's allocation as uint8[n]; ``layout``'s offsets count from its start.
        arena: the mapped arena as uint8[m].
    """

    def __init__(self, layout: ChunkLayout, cache: Bytes, arena: Bytes) -> None:
        self._layout = layout
        self._cache = cache
        self._arena = arena
        self._runs = list(zip(layout.runs, layout.run_offsets(), strict=True))

    def load(self, targets: BlockTargets) -> None:
        """Copy blocks from the arena into the engine's pages.

        Raises:
            IndexError: a block or a chunk lies outside its memory; nothing was copied.
        """
        self._copy(targets, to_arena=False)

    def save(self, targets: BlockTargets) -> None:
        """Copy blocks from the engine's pages into the arena.

        Raises:
            IndexError: a block or a chunk lies outside its memory; nothing was copied.
        """
        self._copy(targets, to_arena=True)

    def _copy(self, targets: BlockTargets, *, to_arena: bool) -> None:
        targets.check(self._layout, len(self._arena))
        arena, cache = self._arena, self._cache
        arena_at, cache_at = arena.ctypes.data, cache.ctypes.data
        plan = plan_copies(targets)
        for run, run_offset in self._runs:
            for copy in plan:
                a = copy.chunk + run_offset + copy.index * run.nbytes
                a_step = copy.chunk_step + copy.index_step * run.nbytes
                c = run.offset + copy.block * run.stride
                c_step = copy.block_step * run.stride
                if copy.count == 1 or a_step == c_step == run.nbytes:
                    to, source = arena_at + a, cache_at + c
                    if not to_arena:
                        to, source = source, to
                    ctypes.memmove(to, source, copy.count * run.nbytes)
                    continue
                shape = (copy.count, run.nbytes)
                in_arena: Bytes = np.ndarray(shape, np.uint8, arena, a, (a_step, 1))
                in_cache: Bytes = np.ndarray(shape, np.uint8, cache, c, (c_step, 1))
                if to_arena:
                    in_arena[...] = in_cache
                else:
                    in_cache[...] = in_arena
