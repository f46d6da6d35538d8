"""Worker half: hands the scheduler half's jobs to a transfer engine, without any RPC.

Blocks being saved are held by the scheduler half until the report; blocks being loaded belong to
a request that vLLM does not run before the report. So no copy needs a lock.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmkv_ray.arena import ArenaReader, find_arena, this_process
from lmkv_ray.arena.names import arena_family
from lmkv_ray.config import Settings
from lmkv_ray.errors import LmkvError
from lmkv_ray.host import host_id
from lmkv_ray.transfer import Ended, Load, Save
from lmkv_ray.transfer.moves import HostMoves, Moved, MovedPiece, TokenMove
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.guard import never_raises
from lmkv_ray.vllm.engine.metadata import (
    EVERY_PLACE,
    NO_ARENA,
    ArenaRef,
    LayoutReport,
    LoadJob,
    MoveJob,
    SaveJob,
    Share,
    StepMetadata,
    WorkerReport,
)
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.engine.support import why_not_anywhere
from lmkv_ray.vllm.worker.adapters_watch import AdapterWatch
from lmkv_ray.vllm.worker.page_format import packing_of, this_platform
from lmkv_ray.vllm.worker.pages import Pages, open_pages
from lmkv_ray.vllm.worker.weights_watch import WeightsWatch, models_of, runner_of_caller

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

REST_SECONDS = 0.1
"""After a pause this long between two steps, in which weights may have been written, a GPU has
nothing else to do, and some words of the weights are compared. On a CPU that is done always."""

PREPARE_SECONDS = 10.0
"""That the start of an engine may take longer so that its node's arena is registered: some 100
GiB."""


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
        groups: the engine's KV groups, in its order.
        settings: of this engine.
    """

    def __init__(
        self,
        config: VllmConfig,
        cache: KVCacheConfig,
        groups: Sequence[Group],
        *,
        settings: Settings,
    ) -> None:
        self._config = config
        self._cache = cache
        self._groups = groups
        self._rank = config.parallel_config.rank
        self._place: int | None = None
        self._share = Share(())
        # vLLM can drop the bad end of a load only where all blocks of a request are in place.
        self._by_block = len(groups) == 1 and groups[0].full
        self._pages: Pages | None = None
        self._arena: tuple[ArenaRef, ArenaReader] | None = None
        self._unmappable: ArenaRef | None = None
        self._expected: ArenaReader | None = None
        self._settings = settings
        self._watch = WeightsWatch(())
        self._adapters = AdapterWatch(None)
        self._looked: StepMetadata | None = None
        self._looked_at = 0.0
        self._suspicious = False
        self._jobs: dict[Load | Save, LoadJob | SaveJob] = {}
        self._moves: HostMoves | None = None
        self._moving: dict[TokenMove, MoveJob] = {}
        self._caches: Mapping[str, torch.Tensor] = {}
        self._models: Sequence[torch.nn.Module] = ()
        self._loading: dict[str, _Loading] = {}
        self._report = WorkerReport()
        self._invalid_blocks: set[int] = set()
        self._stats = LmkvStats()
        if config.device_config.device_type == "cpu" and hasattr(torch.cpu, "_init_amx"):
            # Else a first step of one token (a full hit) dies of SIGILL on AMX machines.
            torch.cpu._init_amx()

    # -- at start -------------------------------------------------------------------------------

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Learn where the pages are, and test it. Raises as ``open_pages`` does."""
        model = self._config.model_config.model
        self._pages = open_pages(
            kv_caches, self._cache, self._groups, settings=self._settings, model=model
        )
        self._caches = kv_caches
        self._expect_arena()
        self._watch_weights()

    def layout_report(self) -> LayoutReport:
        """What the scheduler half needs to know of the pages."""
        known = self._config.compilation_config.static_forward_context
        layers = [
            known[name]
            for group in self._cache.kv_cache_groups
            for name in group.layer_names
            if name in known
        ]
        isas = sorted({str(layer.isa) for layer in known.values() if getattr(layer, "isa", None)})
        name = getattr(self._config.cache_config, "kv_cache_layout", None)
        device = self._config.device_config.device_type
        own = packing_of(layers, this_platform())
        packing = " ".join(filter(None, [device, str(name), *isas, own]))
        layouts = self._pages.layouts if self._pages else ()
        no_moves = self._open_moves()
        return LayoutReport(self._rank, host_id(), this_process(), layouts, packing, no_moves)

    @never_raises("an error, which the log shows, has prevented it")
    def _open_moves(self) -> str:
        """Learn how tokens lie in pages, if text is to be reused anywhere; why it cannot be."""
        if self._settings.anywhere == "off":
            return ""
        if why := why_not_anywhere(self._config, self._groups):
            return why
        from lmkv_ray.vllm.worker.token_pages import open_token_pages

        assert self._pages is not None
        known = self._config.compilation_config.static_forward_context
        pages = open_token_pages(
            self._models,
            known,
            self._caches,
            self._pages.layouts[0],
            self._config.model_config.hf_config.architectures or (),
        )
        if isinstance(pages, str):
            return pages
        self._moves = HostMoves(pages)
        return ""

    @never_raises(None)
    def _expect_arena(self) -> None:
        """Guess which arena the first step will name, and make it ready before graphs are captured.

        Once requests come it would be in their way. A wrong guess is let go of with the first step.
        """
        assert self._pages is not None
        family = arena_family(self._settings.ray_namespace)
        self._expected = find_arena(family, self._settings.arena_dir)
        if self._expected is not None:
            self._pages.engine.prepare(self._expected, PREPARE_SECONDS)

    @never_raises(None)
    def _watch_weights(self) -> None:
        runner = runner_of_caller()
        self._adapters = AdapterWatch(runner)
        if not (models := models_of(runner)):
            logger.warning(
                "lmkv_ray: the model was not found in vLLM's worker: whenever vLLM's prefix cache "
                "is reset, this engine starts with an empty cache."
            )
        self._models = models
        self._watch = WeightsWatch(models)

    # -- every step -----------------------------------------------------------------------------

    def begin_loads(self, step: StepMetadata) -> None:
        """Start this step's loads; and its saves if it has no forward pass to fill their blocks.

        vLLM calls ``wait_for_save`` in such a step since 0.31 only.
        """
        self._attach(step.arenas)
        self._look(step)
        if self._pages is None:
            return
        loads = []
        for job in step.loads:
            if job.place not in (self._place, EVERY_PLACE):
                continue
            loading = self._loading.setdefault(job.request_id, _Loading())
            if (number := self._pages.numbers.get(job.group)) is None:
                continue  # no layer of this group is here
            slots, generations = np.array(job.slots, np.int64), np.array(job.generations, np.uint64)
            blocks = np.array(job.blocks, np.int64)
            arena_id = NO_ARENA if self._refuses(job, step) else job.arena_id
            load = Load(arena_id, slots, generations, blocks, job.skip, number)
            loads.append(load)
            self._jobs[load] = job
            loading.pending += 1
        self._move(step)
        self._pages.engine.begin_loads(loads, idle=step.idle)
        if step.idle:
            self._save(self._pages, step)

    def begin_saves(self, step: StepMetadata) -> None:
        """Start this step's saves; the forward pass that fills their blocks was begun before."""
        self._look(step)
        if self._pages is not None and not step.idle:
            self._save(self._pages, step)

    def finished_loads(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have all ended since the last call, each once.

        Returns:
            all of them; and those of them that must be computed from the start. Where the good
            part of a load can be kept, ``invalid_blocks`` says what cannot.
        """
        for ended in self._pages.engine.ended() if self._pages else ():
            job = self._jobs.pop(ended.copy)
            if isinstance(job, SaveJob):
                self._count("save", ended)
                (self._report.saved if ended.ok else self._report.unsaved)[job.job_id] = 1
            else:
                self._end_load(job, ended)
        for moved in self._moves.ended() if self._moves else ():
            self._end_move(self._moving.pop(moved.move), moved)
        finished = {name for name, loading in self._loading.items() if not loading.pending}
        failed = set()
        for request_id in finished:
            failed_from = self._loading.pop(request_id).failed_from
            if failed_from is not None:
                self._report.failed_loads[request_id] = failed_from
                failed.add(request_id)
        return finished, set() if self._by_block else failed

    def invalid_blocks(self) -> set[int]:
        """Blocks whose load failed since the last call."""
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def report(self) -> WorkerReport | None:
        """What ended by the last ``finished_loads``."""
        report, self._report = self._report, WorkerReport()
        return None if report == WorkerReport() else report

    def take_stats(self) -> LmkvStats | None:
        """Bytes and seconds since the last call."""
        return self._stats.take()

    def shutdown(self) -> None:
        """Copies under way finish first."""
        if self._moves:
            self._moves.close()
            self._moves = None
        if self._pages:
            self._pages.engine.close()
            self._pages = None
        if self._arena:
            self._arena[1].close()
            self._arena = None
        self._expected = None

    def _move(self, step: StepMetadata) -> None:
        for job in step.moves:
            self._loading.setdefault(job.request_id, _Loading()).pending += 1
            arena_id = NO_ARENA if self._suspicious else job.arena_id
            pieces = tuple(
                MovedPiece(
                    np.array([chunk.slot for chunk in piece.chunks], np.int64),
                    np.array([chunk.generation for chunk in piece.chunks], np.uint64),
                    piece.lead,
                    piece.n,
                    piece.delta,
                    piece.dst,
                )
                for piece in job.pieces
            )
            move = TokenMove(arena_id, pieces, np.array(job.blocks, np.int64))
            if self._moves is None:
                self._end_move(job, Moved(move, False))
            else:
                self._moving[move] = job
                self._moves.begin([move], idle=step.idle)

    def _save(self, pages: Pages, step: StepMetadata) -> None:
        saves = []
        for job in step.saves:
            if job.place != self._place:
                continue
            number = pages.numbers.get(job.group)
            if self._refuses(job, step):
                self._report.unsaved[job.job_id] = 1
                continue
            if number is None or (job.slot - self._share.turn) % self._share.turns:
                # Nothing to write here, or another worker has the same bytes and the turn.
                self._report.saved[job.job_id] = 1
                continue
            slots, blocks = np.array([job.slot], np.int64), np.array(job.blocks, np.int64)
            saves.append(Save(job.arena_id, slots, blocks, job.deadline, number))
            self._jobs[saves[-1]] = job
        pages.engine.begin_saves(saves)

    @never_raises(None)
    def _attach(self, arenas: Sequence[ArenaRef | None]) -> None:
        """Find this worker's place, and map the arena there if it is a new one."""
        for place, ref in enumerate(arenas):
            if ref is not None and self._rank in ref.shares:
                self._place, self._share = place, ref.shares[self._rank]
                self._map(ref)

    def _look(self, step: StepMetadata) -> None:
        """Before orders are carried out: whether the weights are still those they are for.

        After a pause they are looked at without orders too: they may be others in this step only.
        """
        if step is self._looked:
            return
        self._looked = step
        self._look_at_adapters()
        now = time.monotonic()
        rested, self._looked_at = now > self._looked_at + REST_SECONDS, now
        if step.check:
            self._report.weights[self._rank] = (step.check, self._check())
            self._suspicious = False
        elif (step.loads or step.saves or rested) and not self._suspicious:
            samples = rested or self._config.device_config.device_type == "cpu"
            self._suspicious = self._is_suspicious(samples)
        self._report.suspicious |= self._suspicious

    @never_raises(None)
    def _look_at_adapters(self) -> None:
        if self._adapters.look():
            self._report.adapters[self._rank] = dict(self._adapters.table)

    def _refuses(self, job: LoadJob | SaveJob, step: StepMetadata) -> bool:
        """Whether an order is for other weights, or another adapter, than there are."""
        if self._suspicious or not job.adapter:
            return self._suspicious
        loaded = self._adapters.table.get(job.adapter)
        meant = step.adapters.get(self._rank, {}).get(job.adapter)
        return loaded is None or loaded[0] != meant

    def _check(self) -> str:
        try:
            return self._watch.check()
        except Exception:
            logger.exception("lmkv_ray: the weights cannot be read: they count as new ones")
            return uuid.uuid4().hex

    @never_raises(True)
    def _is_suspicious(self, samples: bool) -> bool:
        return self._watch.suspicious(samples=samples)

    def _map(self, ref: ArenaRef) -> None:
        if self._pages is None or ref == self._unmappable:
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
        offsets = [self._share.offsets[group] for group in self._pages.numbers]
        self._pages.engine.attach(reader, offsets)
        if self._moves is not None:
            self._moves.attach(reader, offsets[0])

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

    def _end_move(self, job: MoveJob, moved: Moved) -> None:
        """Holes are not computed after a failure, so that nothing behind the exact part is good."""
        self._count("load", moved)
        loading = self._loading[job.request_id]
        loading.pending -= 1
        if moved.ok:
            return
        if loading.failed_from is None or job.exact < loading.failed_from:
            loading.failed_from = job.exact
        self._invalid_blocks.update(job.blocks[job.exact // self._groups[0].block_tokens :])

    def _count(self, direction: str, ended: Ended | Moved) -> None:
        if ended.nbytes:
            self._stats.add(f"{direction}_seconds", ended.seconds)
            self._stats.add(f"{direction}_bytes", ended.nbytes)
