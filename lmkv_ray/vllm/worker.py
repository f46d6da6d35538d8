"""Worker half: a copy engine without any RPC.

Loads and saves run on threads of their own, so that neither waits for the other. Blocks being saved
are pinned by the scheduler half until the report; blocks being loaded belong to a request that vLLM
does not run before the report. So no copy needs a lock.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmkv_ray.arena import ArenaReader
from lmkv_ray.errors import LmkvError, UnsupportedError
from lmkv_ray.layout import ChunkLayout, PageView, derive_layout
from lmkv_ray.vllm.copier import Bytes, HostCopier, Ints, place_blocks
from lmkv_ray.vllm.metadata import (
    ArenaRef,
    LayoutReport,
    LoadJob,
    SaveJob,
    StepMetadata,
    WorkerReport,
)
from lmkv_ray.vllm.stats import LmkvStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

LOAD_PATIENCE = 0.010
"""Seconds an otherwise idle step waits for its loads: finer than the engine's own polling."""

SAVE_PATIENCE = 0.020
"""Seconds a step waits for saves it began: most end within, and their blocks are freed at once."""


class WorkerHalf:
    """One per vLLM worker.

    Args:
        config: the engine's configuration.
        num_blocks: blocks in the engine's cache.
        blocks: blocks in one chunk.
        copy_threads: threads for loads; saves have one.
    """

    def __init__(
        self, config: VllmConfig, *, num_blocks: int, blocks: int, copy_threads: int
    ) -> None:
        self._config = config
        self._num_blocks = num_blocks
        self._blocks = blocks
        self._layout: ChunkLayout | None = None
        self._cache: Bytes = np.empty(0, np.uint8)
        self._arena: tuple[ArenaRef, ArenaReader, HostCopier] | None = None
        self._unmappable: ArenaRef | None = None
        self._loading = ThreadPoolExecutor(copy_threads, thread_name_prefix="lmkv-load")
        self._saving = ThreadPoolExecutor(1, thread_name_prefix="lmkv-save")
        self._copy_threads = copy_threads
        self._loads: list[tuple[LoadJob, list[Future[int | None]]]] = []
        self._saves: dict[Future[bool], SaveJob] = {}
        self._populating = _nothing()
        self._report = WorkerReport()
        self._invalid_blocks: set[int] = set()
        self._stats = LmkvStats()
        if config.device_config.device_type == "cpu" and hasattr(torch.cpu, "_init_amx"):
            # Else a first step of one token (a full hit) dies of SIGILL on AMX machines.
            torch.cpu._init_amx()

    # -- at start -------------------------------------------------------------------------------

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Learn where the pages are.

        Raises:
            UnsupportedError: the tensors' strides are not understood, or the self-test failed.
        """
        storages = [tensor.untyped_storage() for tensor in kv_caches.values()]
        base = min(s.data_ptr() for s in storages)
        end = max(s.data_ptr() + s.nbytes() for s in storages)
        views = [
            PageView(
                layer=name,
                shape=tuple(tensor.shape),
                strides=tuple(s * tensor.element_size() for s in tensor.stride()),
                itemsize=tensor.element_size(),
                offset=tensor.data_ptr() - base,
            )
            for name, tensor in kv_caches.items()
        ]
        self._layout = derive_layout(views, num_blocks=self._num_blocks, blocks=self._blocks)
        memory = (ctypes.c_uint8 * (end - base)).from_address(base)
        self._cache = np.ctypeslib.as_array(memory)
        self._self_test(kv_caches)

    def layout_report(self) -> LayoutReport:
        """What the scheduler half needs to know of the pages."""
        assert self._layout is not None
        layers = self._config.compilation_config.static_forward_context.values()
        isas = sorted({str(layer.isa) for layer in layers if getattr(layer, "isa", None)})
        name = getattr(self._config.cache_config, "kv_cache_layout", None)
        device = self._config.device_config.device_type
        return LayoutReport(self._layout, " ".join([device, str(name), *isas]))

    def _self_test(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Save one block, load it into another, and compare through the engine's own views."""
        layout = self._layout
        assert layout is not None
        if layout.num_blocks < 2:
            return
        arena = np.zeros(layout.chunk_bytes, np.uint8)
        copier = HostCopier(layout, self._cache, arena)
        source, target = layout.num_blocks - 1, layout.num_blocks - 2

        def part(tensor: torch.Tensor, block: int) -> torch.Tensor:
            rows = tensor.shape[0] // layout.num_blocks
            return tensor.view(torch.uint8)[block * rows : (block + 1) * rows]

        for i, tensor in enumerate(kv_caches.values()):
            block = part(tensor, source)
            block.copy_((torch.arange(block.numel()) % (251 - i % 7)).view(block.shape))
        at = np.zeros(1, np.int64)
        copier.save(place_blocks(at, np.array([source]), skip=0, per_chunk=layout.blocks))
        copier.load(place_blocks(at, np.array([target]), skip=0, per_chunk=layout.blocks))
        tensors = kv_caches.values()
        good = all(torch.equal(part(t, source), part(t, target)) for t in tensors)
        for tensor in tensors:
            part(tensor, source).zero_()
            part(tensor, target).zero_()
        if not good:
            raise UnsupportedError(
                f"Blocks of {self._config.model_config.model} did not survive a copy to a chunk "
                "and back: its KV cache layout is not what its strides say.",
                next_step="Set VLLM_KV_CACHE_LAYOUT=LBHNC, or report the attention backend.",
            )

    # -- every step -----------------------------------------------------------------------------

    def begin_loads(self, step: StepMetadata) -> None:
        """Start this step's loads."""
        self._attach(step.arena)
        if self._arena is not None and self._arena[1].grown and self._populating.done():
            self._populating = self._saving.submit(_populate, self._arena[1])
        for job in step.loads:
            parts = job.split(self._copy_threads, self._blocks)
            self._loads.append((job, [self._loading.submit(self._load, part) for part in parts]))
        if step.idle and self._loads:
            futures = [future for _, parts in self._loads for future in parts]
            wait(futures, timeout=LOAD_PATIENCE)

    def begin_saves(self, step: StepMetadata) -> None:
        """Start this step's saves; the forward pass that fills their blocks has ended."""
        for job in step.saves:
            self._saves[self._saving.submit(self._save, job)] = job
        if self._saves:
            wait(self._saves, timeout=SAVE_PATIENCE)

    def finished_loads(self) -> set[str]:
        """Requests whose load ended, well or not, since the last call; each once."""
        finished, going = set(), []
        for job, parts in self._loads:
            if not all(part.done() for part in parts):
                going.append((job, parts))
                continue
            finished.add(job.request_id)
            failed = [chunk for part in parts if (chunk := part.result()) is not None]
            if failed:
                self._report.failed_loads[job.request_id] = min(failed)
                keep = (min(failed) - job.first_chunk) * self._blocks - job.skip
                self._invalid_blocks.update(job.blocks[max(0, keep) :])
        self._loads = going
        return finished

    def invalid_blocks(self) -> set[int]:
        """Blocks whose load failed since the last call."""
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def report(self) -> WorkerReport | None:
        """What ended since the last call."""
        for future in [f for f in self._saves if f.done()]:
            job = self._saves.pop(future)
            (self._report.saved if future.result() else self._report.unsaved)[job.job_id] = 1
        report, self._report = self._report, WorkerReport()
        return report if report.saved or report.unsaved or report.failed_loads else None

    def stats(self) -> LmkvStats | None:
        """Bytes and seconds since the last call."""
        stats, self._stats = self._stats, LmkvStats()
        return None if stats.is_empty() else stats

    def shutdown(self) -> None:
        """End the threads; copies under way finish first."""
        self._loading.shutdown(cancel_futures=True)
        self._saving.shutdown(cancel_futures=True)
        if self._arena:
            self._arena[1].close()
            self._arena = None

    # -- the copies -----------------------------------------------------------------------------

    def _attach(self, ref: ArenaRef | None) -> None:
        if ref is None or self._layout is None or ref == self._unmappable:
            return
        if self._arena is not None and self._arena[0].arena_id == ref.arena_id:
            return
        try:
            reader = ArenaReader.attach(ref.path, ref.arena_id)
        except (LmkvError, OSError) as error:
            self._unmappable = ref  # once: there is another path when the shard has restarted
            logger.warning("lmkv_ray: cannot map the arena: %s", error)
            return
        # A copy under way keeps the old mapping alive through its own reference.
        self._arena = (ref, reader, HostCopier(self._layout, self._cache, reader.data))

    def _load(self, job: LoadJob) -> int | None:
        """None, or the first chunk of the request that is not good."""
        arena = self._arena  # once: the engine's thread may exchange it
        if arena is None or arena[0].arena_id != job.arena_id:
            return job.first_chunk
        _, reader, copier = arena
        slots = np.array(job.slots, np.int64)
        began = time.perf_counter()
        try:
            copier.load(self._place(reader, slots, job.blocks, job.skip))
            unchanged = reader.unchanged(slots, np.array(job.generations, np.uint64))
        except Exception:
            logger.exception("lmkv_ray: a load failed; the tokens are recomputed")
            return job.first_chunk
        self._stats.add("load_seconds", time.perf_counter() - began)
        self._stats.add("load_bytes", len(job.blocks) * self._block_bytes)
        return None if unchanged.all() else job.first_chunk + int(np.argmin(unchanged))

    def _save(self, job: SaveJob) -> bool:
        arena = self._arena
        if arena is None or arena[0].arena_id != job.arena_id:
            return False
        if time.monotonic() > job.deadline:
            return False
        _, reader, copier = arena
        began = time.perf_counter()
        try:
            copier.save(self._place(reader, np.array([job.slot], np.int64), job.blocks, 0))
        except Exception:
            logger.exception("lmkv_ray: a save failed; the chunk is not kept")
            return False
        self._stats.add("save_seconds", time.perf_counter() - began)
        self._stats.add("save_bytes", len(job.blocks) * self._block_bytes)
        return True

    def _place(self, reader: ArenaReader, slots: Ints, blocks: list[int], skip: int) -> Any:
        ids = np.array(blocks, np.int64)
        return place_blocks(reader.offsets(slots), ids, skip=skip, per_chunk=self._blocks)

    @property
    def _block_bytes(self) -> int:
        assert self._layout is not None
        return self._layout.block_bytes


def _populate(reader: ArenaReader) -> None:
    """Fault the arena in ahead of the first copies, beside the engine's work."""
    for _ in reader.populate():
        pass


def _nothing() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
