"""Worker half: hands the scheduler half's jobs to a transfer engine, without any RPC.

Blocks being saved are pinned by the scheduler half until the report; blocks being loaded belong to
a request that vLLM does not run before the report. So no copy needs a lock.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lmkv_ray.arena import ArenaReader
from lmkv_ray.errors import LmkvError, UnsupportedError
from lmkv_ray.layout import ChunkLayout, PageView, derive_layout
from lmkv_ray.transfer import (
    Ended,
    HostEngine,
    Load,
    Save,
    ScratchArena,
    TransferEngine,
)
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

SELF_TEST_SECONDS = 30.0
"""Within which one block must have been copied to a chunk and back."""


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
        self._engine: TransferEngine | None = None
        self._arena: tuple[ArenaRef, ArenaReader] | None = None
        self._unmappable: ArenaRef | None = None
        self._copy_threads = copy_threads
        self._jobs: dict[Load | Save, LoadJob | SaveJob] = {}
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
        cache = np.ctypeslib.as_array(memory)
        self._engine = HostEngine([self._layout], cache, threads=self._copy_threads)
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
        layout, engine = self._layout, self._engine
        assert layout is not None
        assert engine is not None
        if layout.num_blocks < 2:
            return
        source, target = layout.num_blocks - 1, layout.num_blocks - 2

        def part(tensor: torch.Tensor, block: int) -> torch.Tensor:
            rows = tensor.shape[0] // layout.num_blocks
            return tensor.view(torch.uint8)[block * rows : (block + 1) * rows]

        def blocks(block: int) -> npt.NDArray[np.int64]:
            """A whole chunk of one block, over and over."""
            return np.full(layout.blocks, block)

        for i, tensor in enumerate(kv_caches.values()):
            block = part(tensor, source)
            block.copy_((torch.arange(block.numel()) % (251 - i % 7)).view(block.shape))
        arena, slots = ScratchArena(layout.chunk_bytes), np.zeros(1, np.int64)
        engine.attach(arena, [0])
        deadline = time.monotonic() + SELF_TEST_SECONDS
        engine.begin_saves([Save(arena.arena_id, slots, blocks(source), deadline)])
        good = self._ended_well(deadline)
        engine.begin_loads(
            [Load(arena.arena_id, slots, np.zeros(1, np.uint64), blocks(target)[:1])], idle=True
        )
        good = self._ended_well(deadline) and good
        tensors = kv_caches.values()
        good = good and all(torch.equal(part(t, source), part(t, target)) for t in tensors)
        for tensor in tensors:
            part(tensor, source).zero_()
            part(tensor, target).zero_()
        if not good:
            raise UnsupportedError(
                f"Blocks of {self._config.model_config.model} did not survive a copy to a chunk "
                "and back: its KV cache layout is not what its strides say.",
                next_step="Set VLLM_KV_CACHE_LAYOUT=LBHNC, or report the attention backend.",
            )

    def _ended_well(self, deadline: float) -> bool:
        """Wait for the one copy under way."""
        assert self._engine is not None
        while time.monotonic() < deadline:
            for ended in self._engine.ended():
                return ended.ok
            time.sleep(0.001)
        return False

    # -- every step -----------------------------------------------------------------------------

    def begin_loads(self, step: StepMetadata) -> None:
        """Start this step's loads."""
        self._attach(step.arena)
        if self._engine is None:
            return
        loads = []
        for job in step.loads:
            slots, generations = np.array(job.slots, np.int64), np.array(job.generations, np.uint64)
            blocks = np.array(job.blocks, np.int64)
            loads.append(Load(job.arena_id, slots, generations, blocks, job.skip))
            self._jobs[loads[-1]] = job
        self._engine.begin_loads(loads, idle=step.idle)

    def begin_saves(self, step: StepMetadata) -> None:
        """Start this step's saves; the forward pass that fills their blocks was begun before."""
        if self._engine is None:
            return
        saves = []
        for job in step.saves:
            slots, blocks = np.array([job.slot], np.int64), np.array(job.blocks, np.int64)
            saves.append(Save(job.arena_id, slots, blocks, job.deadline))
            self._jobs[saves[-1]] = job
        self._engine.begin_saves(saves)

    def finished_loads(self) -> set[str]:
        """Requests whose load ended, well or not, since the last call; each once."""
        finished = set()
        for ended in self._engine.ended() if self._engine else ():
            job = self._jobs.pop(ended.copy)
            if isinstance(job, LoadJob):
                finished.add(job.request_id)
                self._end_load(job, ended)
            else:
                self._count("save", ended)
                (self._report.saved if ended.ok else self._report.unsaved)[job.job_id] = 1
        return finished

    def invalid_blocks(self) -> set[int]:
        """Blocks whose load failed since the last call."""
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def report(self) -> WorkerReport | None:
        """What ended by the last ``finished_loads``."""
        report, self._report = self._report, WorkerReport()
        return report if report.saved or report.unsaved or report.failed_loads else None

    def stats(self) -> LmkvStats | None:
        """Bytes and seconds since the last call."""
        stats, self._stats = self._stats, LmkvStats()
        return None if stats.is_empty() else stats

    def shutdown(self) -> None:
        """Copies under way finish first."""
        if self._engine:
            self._engine.close()
            self._engine = None
        if self._arena:
            self._arena[1].close()
            self._arena = None

    def _attach(self, ref: ArenaRef | None) -> None:
        if ref is None or self._engine is None or ref == self._unmappable:
            return
        if self._arena is not None and self._arena[0].arena_id == ref.arena_id:
            return
        try:
            reader = ArenaReader.attach(ref.path, ref.arena_id)
        except (LmkvError, OSError) as error:
            self._unmappable = ref  # once: there is another path when the shard has restarted
            logger.warning("lmkv_ray: cannot map the arena: %s", error)
            return
        self._arena = (ref, reader)
        self._engine.attach(reader, [0])

    def _end_load(self, job: LoadJob, ended: Ended) -> None:
        self._count("load", ended)
        if not ended.ok:
            self._report.failed_loads[job.request_id] = job.first_chunk + ended.good
            keep = ended.good * self._blocks - job.skip
            self._invalid_blocks.update(job.blocks[max(0, keep) :])

    def _count(self, direction: str, ended: Ended) -> None:
        if ended.nbytes:
            self._stats.add(f"{direction}_seconds", ended.seconds)
            self._stats.add(f"{direction}_bytes", ended.nbytes)
