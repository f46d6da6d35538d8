"""Worker half: hands the scheduler half's jobs to a transfer engine, without any RPC.

Blocks being saved are pinned by the scheduler half until the report; blocks being loaded belong to
a request that vLLM does not run before the report. So no copy needs a lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lmkv_ray.actors.names import arena_family
from lmkv_ray.arena import ArenaReader, find_arena
from lmkv_ray.config import Settings
from lmkv_ray.errors import LmkvError, UnsupportedError
from lmkv_ray.layout import ChunkLayout, PageView, derive_layout
from lmkv_ray.transfer import (
    Ended,
    Gpu,
    Load,
    Save,
    ScratchArena,
    TransferEngine,
    open_engine,
)
from lmkv_ray.transports import host_id
from lmkv_ray.vllm.groups import Group
from lmkv_ray.vllm.guard import never_raises
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
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

SELF_TEST_SECONDS = 30.0
"""Within which one block must have been copied to a chunk and back."""

PREPARE_SECONDS = 10.0
"""That the start of an engine may take longer so that its node's arena is pinned: some 100 GiB."""


@dataclass(slots=True)
class _Loading:
    """The loads of one request, one a group."""

    pending: int = 0
    failed_from: int | None = None
    """The first token that is not good."""


class WorkerHalf:
    """One per vLLM worker.

    Args:
        config: the engine's configuration.
        cache: of the engine's pages, as this worker has them.
        groups: of the engine.
        replicas: consecutive workers whose pages are the same bytes.
        settings: of this engine.
    """

    def __init__(
        self,
        config: VllmConfig,
        cache: KVCacheConfig,
        groups: Sequence[Group],
        *,
        replicas: int,
        settings: Settings,
    ) -> None:
        self._config = config
        self._num_blocks = cache.num_blocks
        self._layers = [frozenset(group.layer_names) for group in cache.kv_cache_groups]
        self._groups = groups
        self._rank = config.parallel_config.rank
        self._replicas = replicas
        # vLLM can drop the bad end of a load only where all blocks of a request are in place.
        self._by_block = len(groups) == 1 and groups[0].full
        self._layouts: tuple[ChunkLayout, ...] = ()
        self._engine: TransferEngine | None = None
        self._arena: tuple[ArenaRef, ArenaReader] | None = None
        self._unmappable: ArenaRef | None = None
        self._expected: ArenaReader | None = None
        self._settings = settings
        self._jobs: dict[Load | Save, LoadJob | SaveJob] = {}
        self._loading: dict[str, _Loading] = {}
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
        by_group = [
            _distinct({name: t for name, t in kv_caches.items() if name in layers})
            for layers in self._layers
        ]
        self._layouts = tuple(
            derive_layout(
                [_view(name, tensor, base) for name, tensor in tensors.items()],
                num_blocks=self._num_blocks,
                blocks=group.blocks,
            )
            for group, tensors in zip(self._groups, by_group, strict=True)
        )
        self._engine = open_engine(
            self._layouts,
            cache=base,
            cache_bytes=end - base,
            settings=self._settings,
            gpu=_gpu(next(iter(kv_caches.values()))),
        )
        for group, tensors in zip(self._groups, by_group, strict=True):
            self._self_test(group.number, list(tensors.values()))
        self._expect_arena()

    def layout_report(self) -> LayoutReport:
        """What the scheduler half needs to know of the pages."""
        layers = self._config.compilation_config.static_forward_context.values()
        isas = sorted({str(layer.isa) for layer in layers if getattr(layer, "isa", None)})
        name = getattr(self._config.cache_config, "kv_cache_layout", None)
        device = self._config.device_config.device_type
        packing = " ".join([device, str(name), *isas])
        return LayoutReport(self._rank, host_id(), self._layouts, packing)

    @never_raises(None)
    def _expect_arena(self) -> None:
        """Guess which arena the first step will name, and make it ready before graphs are captured.

        Once requests come it would be in their way. A wrong guess is let go of with the first step.
        """
        assert self._engine is not None
        family = arena_family(self._settings.ray_namespace)
        self._expected = find_arena(family, self._settings.arena_dir)
        if self._expected is not None:
            self._engine.prepare(self._expected, PREPARE_SECONDS)

    def _self_test(self, group: int, tensors: Sequence[torch.Tensor]) -> None:
        """Save one block, load it into another, and compare through the engine's own views."""
        layout, engine = self._layouts[group], self._engine
        assert engine is not None
        if layout.num_blocks < 2 or not tensors:
            return
        source, target = layout.num_blocks - 1, layout.num_blocks - 2

        def part(tensor: torch.Tensor, block: int) -> torch.Tensor:
            rows = tensor.shape[0] // layout.num_blocks
            return tensor.view(torch.uint8)[block * rows : (block + 1) * rows]

        def blocks(block: int) -> npt.NDArray[np.int64]:
            """A whole chunk of one block, over and over."""
            return np.full(layout.blocks, block)

        for i, tensor in enumerate(tensors):
            block = part(tensor, source)
            block.copy_((torch.arange(block.numel()) % (251 - i % 7)).view(block.shape))
        arena, slots = ScratchArena(layout.chunk_bytes), np.zeros(1, np.int64)
        engine.attach(arena, [0] * len(self._layouts))
        deadline = time.monotonic() + SELF_TEST_SECONDS
        engine.begin_saves([Save(arena.arena_id, slots, blocks(source), deadline, group)])
        good = self._ended_well(deadline)
        generations, one = np.zeros(1, np.uint64), blocks(target)[:1]
        load = Load(arena.arena_id, slots, generations, one, group=group)
        engine.begin_loads([load], idle=True)
        good = self._ended_well(deadline) and good
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
            load = Load(job.arena_id, slots, generations, blocks, job.skip, job.group)
            loads.append(load)
            self._jobs[load] = job
            self._loading.setdefault(job.request_id, _Loading()).pending += 1
        self._engine.begin_loads(loads, idle=step.idle)

    def begin_saves(self, step: StepMetadata) -> None:
        """Start this step's saves; the forward pass that fills their blocks was begun before."""
        if self._engine is None:
            return
        saves = []
        for job in step.saves:
            if (job.slot - self._rank) % self._replicas:
                # Another worker has the same bytes; they take turns.
                self._report.saved[job.job_id] = 1
                continue
            slots, blocks = np.array([job.slot], np.int64), np.array(job.blocks, np.int64)
            saves.append(Save(job.arena_id, slots, blocks, job.deadline, job.group))
            self._jobs[saves[-1]] = job
        self._engine.begin_saves(saves)

    def finished_loads(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have all ended since the last call, each once.

        Returns:
            all of them; and those of them that must be computed from the start. Where the good
            part of a load can be kept, ``invalid_blocks`` says what cannot.
        """
        finished, failed = set(), set()
        for ended in self._engine.ended() if self._engine else ():
            job = self._jobs.pop(ended.copy)
            if isinstance(job, SaveJob):
                self._count("save", ended)
                (self._report.saved if ended.ok else self._report.unsaved)[job.job_id] = 1
                continue
            self._end_load(job, ended)
            loading = self._loading[job.request_id]
            if loading.pending:
                continue
            del self._loading[job.request_id]
            finished.add(job.request_id)
            if loading.failed_from is not None:
                self._report.failed_loads[job.request_id] = loading.failed_from
                failed.add(job.request_id)
        return finished, set() if self._by_block else failed

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
        self._expected = None

    @never_raises(None)
    def _attach(self, ref: ArenaRef | None) -> None:
        if ref is None or self._engine is None or ref == self._unmappable:
            return
        if self._arena is not None and self._arena[0].arena_id == ref.arena_id:
            return
        expected, self._expected = self._expected, None
        try:
            if expected is not None and expected.arena_id == ref.arena_id:
                reader = expected
            else:
                reader = ArenaReader.attach(ref.path, ref.arena_id)
        except (LmkvError, OSError) as error:
            self._unmappable = ref  # once: there is another path when the shard has restarted
            logger.warning("lmkv_ray: cannot map the arena: %s", error)
            return
        self._arena = (ref, reader)
        self._engine.attach(reader, ref.offsets[self._rank])

    def _end_load(self, job: LoadJob, ended: Ended) -> None:
        self._count("load", ended)
        loading, group = self._loading[job.request_id], self._groups[job.group]
        loading.pending -= 1
        if ended.ok:
            return
        token = (job.first_chunk + ended.good) * group.tokens
        if loading.failed_from is None or token < loading.failed_from:
            loading.failed_from = token
        if self._by_block:
            keep = ended.good * group.blocks - job.skip
            self._invalid_blocks.update(job.blocks[max(0, keep) :])

    def _count(self, direction: str, ended: Ended) -> None:
        if ended.nbytes:
            self._stats.add(f"{direction}_seconds", ended.seconds)
            self._stats.add(f"{direction}_bytes", ended.nbytes)


def _gpu(pages: torch.Tensor) -> Gpu | None:
    """Where these pages are, if on a GPU."""
    if not pages.is_cuda:  # true for AMD's too
        return None
    return Gpu(pages.device.index, lambda: int(torch.cuda.current_stream().cuda_stream))


def _view(name: str, tensor: torch.Tensor, base: int) -> PageView:
    """What a layer's KV cache looks like, in bytes from ``base``."""
    return PageView(
        layer=name,
        shape=tuple(tensor.shape),
        strides=tuple(s * tensor.element_size() for s in tensor.stride()),
        itemsize=tensor.element_size(),
        offset=tensor.data_ptr() - base,
    )


def _distinct(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without layers that use the cache of another one before them."""
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
    return {name: tensors[name] for name in first.values()}
