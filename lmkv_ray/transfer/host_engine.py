"""The engine for pages in host memory: copies on a few threads.

Loads and saves run on threads of their own, so that neither waits for the other. The forward pass
of a CPU has ended when ``begin_saves`` is called, so nothing has to be ordered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

import numpy as np

from lmkv_ray.layout import ChunkLayout
from lmkv_ray.transfer.base import Arena, Bytes, Ended, Ints, Load, Save
from lmkv_ray.transfer.crew import Crew
from lmkv_ray.transfer.host_copier import HostCopier
from lmkv_ray.transfer.targets import BlockTargets, target_blocks

logger = logging.getLogger(__name__)

LOAD_PATIENCE = 0.010
"""Seconds an otherwise idle step waits for its loads: finer than the engine's own polling."""

SAVE_PATIENCE = 0.020
"""Seconds a step waits for saves it began: most end within, and their blocks are freed at once."""


class HostEngine:
    """A ``TransferEngine`` over one allocation in this process's memory.

    Args:
        layouts: one per KV group.
        cache: the engine's allocation as uint8[n]; the layouts' offsets count from its start.
        threads: for loads; saves have one.
    """

    def __init__(self, layouts: Sequence[ChunkLayout], cache: Bytes, *, threads: int) -> None:
        self._layouts = layouts
        self._cache = cache
        self._threads = threads
        self._arena: tuple[Arena, list[HostCopier], list[int]] | None = None
        self._loading = Crew(threads, "lmkv-load")
        self._saving = Crew(1, "lmkv-save")
        self._loads: list[tuple[Load, list[Future[Ended]]]] = []
        self._saves: list[tuple[Save, Future[Ended]]] = []
        self._populating = _nothing()

    def prepare(self, arena: Arena, within: float) -> None:
        """See ``TransferEngine``; faulting in waits for nothing, and goes on beside the rest."""
        self._populating = self._saving.submit(_populate, arena)

    def attach(self, arena: Arena, offsets: Sequence[int]) -> None:
        """See ``TransferEngine``."""
        copiers = [HostCopier(layout, self._cache, arena.data) for layout in self._layouts]
        # A copy under way keeps the old mapping alive through its own reference.
        self._arena = (arena, copiers, list(offsets))

    def begin_loads(self, loads: Sequence[Load], *, idle: bool) -> None:
        """See ``TransferEngine``."""
        if self._arena is not None and self._arena[0].grown and self._populating.done():
            self._populating = self._saving.submit(_populate, self._arena[0])
        for load in loads:
            pieces = split(load, self._threads, self._layouts[load.group].blocks)
            self._loads.append((load, [self._loading.submit(self._load, p) for p in pieces]))
        if idle and self._loads:
            wait([future for _, pieces in self._loads for future in pieces], LOAD_PATIENCE)

    def begin_saves(self, saves: Sequence[Save]) -> None:
        """See ``TransferEngine``."""
        self._saves += [(save, self._saving.submit(self._save, save)) for save in saves]
        if self._saves:
            wait([future for _, future in self._saves], SAVE_PATIENCE)

    def ended(self) -> list[Ended]:
        """See ``TransferEngine``."""
        ended, copying = [], []
        for save, future in self._saves:
            if future.done():
                ended.append(_outcome(save, future))
            else:
                copying.append((save, future))
        self._saves = copying
        going = []
        for load, pieces in self._loads:
            if all(piece.done() for piece in pieces):
                ended.append(_join(load, [_outcome(load, piece) for piece in pieces]))
            else:
                going.append((load, pieces))
        self._loads = going
        return ended

    def close(self) -> None:
        """See ``TransferEngine``."""
        self._loading.close()
        self._saving.close()
        self._arena = None

    def _load(self, load: Load) -> Ended:
        arena = self._arena  # once: the engine's thread may exchange it
        if arena is None or arena[0].arena_id != load.arena_id:
            return Ended(load, False, 0)
        reader, copiers, offsets = arena
        began = time.perf_counter()
        try:
            at = self._locate(reader, load, offsets)
            copiers[load.group].load(self._targets(load, at))
            unchanged = reader.unchanged(load.slots, load.generations)
        except Exception:
            logger.exception("lmkv_ray: a load failed; the tokens are recomputed")
            return Ended(load, False, 0)
        ok = bool(unchanged.all())
        return self._done(load, ok, len(unchanged) if ok else int(np.argmin(unchanged)), began)

    def _save(self, save: Save) -> Ended:
        arena = self._arena
        if arena is None or arena[0].arena_id != save.arena_id:
            return Ended(save, False, 0)
        if time.monotonic() > save.deadline:
            return Ended(save, False, 0)
        reader, copiers, offsets = arena
        began = time.perf_counter()
        try:
            at = self._locate(reader, save, offsets)
            copiers[save.group].save(self._targets(save, at))
        except Exception:
            logger.exception("lmkv_ray: a save failed; the chunk is not kept")
            return Ended(save, False, 0)
        return self._done(save, True, len(save.slots), began)

    def _locate(self, reader: Arena, copy: Load | Save, offsets: list[int]) -> Ints:
        """Where this worker's slices of chunks begin in the arena's data."""
        offset = offsets[copy.group]
        return reader.offsets(copy.slots, offset + self._layouts[copy.group].chunk_bytes) + offset

    def _targets(self, copy: Load | Save, at: Ints) -> BlockTargets:
        per_chunk = self._layouts[copy.group].blocks
        return target_blocks(at, copy.blocks, skip=copy.skip, per_chunk=per_chunk)

    def _done(self, copy: Load | Save, ok: bool, good: int, began: float) -> Ended:
        nbytes = len(copy.blocks) * self._layouts[copy.group].block_bytes
        return Ended(copy, ok, good, nbytes, time.perf_counter() - began)


def split(load: Load, pieces: int, per_chunk: int) -> list[Load]:
    """The same copies as up to ``pieces`` loads of about equal size, each of whole chunks."""
    if len(load.slots) < 2:
        return [load]
    size = -(-len(load.slots) // pieces)
    loads = []
    for at in range(0, len(load.slots), size):
        first, end = max(0, at * per_chunk - load.skip), (at + size) * per_chunk - load.skip
        slots, generations = load.slots[at : at + size], load.generations[at : at + size]
        skip = load.skip if at == 0 else 0
        loads.append(
            Load(load.arena_id, slots, generations, load.blocks[first:end], skip, load.group)
        )
    return loads


def _outcome(copy: Load | Save, future: Future[Ended]) -> Ended:
    """How a copy ended: not good if no thread was there for it."""
    return Ended(copy, False, 0) if future.cancelled() else future.result()


def _join(load: Load, pieces: list[Ended]) -> Ended:
    """The pieces of a split load as one."""
    good = 0
    for piece in pieces:
        good += piece.good
        if not piece.ok:
            break
    ok = all(piece.ok for piece in pieces)
    return Ended(load, ok, good, sum(p.nbytes for p in pieces), sum(p.seconds for p in pieces))


def _populate(arena: Arena) -> None:
    """Fault the arena in ahead of the first copies, beside the engine's work."""
    for _ in arena.populate():
        pass


def _nothing() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
