"""The class vLLM loads: it only distributes calls to the two halves.

Interface: vLLM 0.29 to 0.33, ``KVConnectorBase_V1``. Loads are asynchronous, between steps; no
per-layer hook does anything, so CUDA graphs stay whole.

Each half is imported where it runs: a worker does not pay for what only the engine's thread needs.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from lmkv_ray.config import load_settings
from lmkv_ray.errors import ConfigError
from lmkv_ray.vllm.engine import log
from lmkv_ray.vllm.engine.groups import chunk_tokens, derive_groups
from lmkv_ray.vllm.engine.metadata import LayoutReport, StepMetadata, WorkerReport
from lmkv_ray.vllm.engine.stats import LmkvPromMetrics, LmkvStats
from lmkv_ray.vllm.engine.support import check_engine, kv_replicas

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from lmkv_ray.courier import Courier
    from lmkv_ray.vllm.identity.content import ContentThread
    from lmkv_ray.vllm.link.shard_link import ShardClient, ShardLink
    from lmkv_ray.vllm.scheduler.anywhere import Anywhere
    from lmkv_ray.vllm.scheduler.composer import Composer
    from lmkv_ray.vllm.scheduler.half import SchedulerHalf
    from lmkv_ray.vllm.worker.half import WorkerHalf


class LmkvConnector(KVConnectorBase_V1, SupportsHMA):
    """lmkv_ray as vLLM's KV connector.

    Raises:
        ConfigError: a wrong setting in ``kv_connector_extra_config`` or the environment.
        UnsupportedError: this model, device or parallel shape is not supported.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log.show()
        check_engine(vllm_config, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_role != "kv_both":
            raise ConfigError(
                f"kv_role is {transfer.kv_role}.", next_step="Set kv_role to kv_both: a cache."
            )
        # vLLM's default turns a failed load into a failed request; a cache must never do that.
        transfer.kv_load_failure_policy = "recompute"
        self._settings = load_settings(transfer.kv_connector_extra_config)
        self._groups = derive_groups(kv_cache_config, chunk_tokens(vllm_config, self._settings))
        self._engine_id = f"{transfer.engine_id or uuid.uuid4().hex}-{os.getpid()}"
        self._scheduler: SchedulerHalf | None = None
        self._links: tuple[ShardLink, ...] = ()
        self._courier: Courier | None = None
        self._content: ContentThread | None = None
        self._pool: BlockPool | None = None
        self._worker: WorkerHalf | None = None
        self.rows = False
        """VLLM's scheduler is the one of ``vllm.scheduler.rows``, which says so."""
        if role is KVConnectorRole.WORKER:
            from lmkv_ray.vllm.worker.half import WorkerHalf

            self._worker = WorkerHalf(
                vllm_config,
                kv_cache_config,
                self._groups,
                settings=self._settings,
            )

    # -- both -----------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: an output is good whether or not its KV was saved."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """No layer hook does anything."""
        return False

    def shutdown(self) -> None:
        """End threads and mappings."""
        if self._content is not None:
            self._content.stop()
        for link in self._links:
            link.end()
        if self._courier is not None:
            self._courier.close()
        for link in self._links:
            link.stop()
        if self._worker is not None:
            self._worker.shutdown()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts of this half since the last call."""
        half = self._scheduler if self._scheduler is not None else self._worker
        return half.take_stats() if half is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        """Counts from their wire form."""
        return LmkvStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """Our counters on vLLM's Prometheus endpoint."""
        return LmkvPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- worker ---------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn the pages' layout and test it."""
        self._the_worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Tell the scheduler half the pages' layout."""
        return self._worker.layout_report() if self._worker is not None else None

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Begin this step's loads."""
        self._the_worker.begin_loads(self._step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads end before their request runs."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: chunks are saved after the step."""

    def wait_for_save(self) -> None:
        """Begin this step's saves."""
        self._the_worker.begin_saves(self._step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose load ended; saves are never reported here (see ``WorkerReport``)."""
        return None, self._the_worker.finished_loads()[0] or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The same, with the loads that failed as a whole (not asked by vLLM 0.29)."""
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

        finished, failed = self._the_worker.finished_loads()
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that must be recomputed."""
        return self._the_worker.invalid_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What ended in this step."""
        return self._the_worker.report()

    # -- scheduler ------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Keep vLLM's block pool, in which blocks are held."""
        self._pool = gpu_block_pool

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """With the workers' layouts known, the namespace is: start."""
        self._start(metadata.values())

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """The same, of all pipeline stages."""
        self._start(metadata.values())

    def on_new_request(self, request: Request) -> None:
        """See ``SchedulerHalf``."""
        self._the_scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See ``SchedulerHalf.match``."""
        return self._the_scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """See ``SchedulerHalf.admitted``."""
        self._the_scheduler.admitted(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See ``SchedulerHalf.step``."""
        return self._the_scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take in what the workers report."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._the_scheduler.on_report(report)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See ``request_finished_all_groups``."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never delays the freeing of blocks: those being saved are held."""
        keys, reused = self._the_scheduler.keys_of(request), self._the_scheduler.reused_by(request)
        self._the_scheduler.on_finished(request, block_ids)
        told = ({} if keys is None else {"lmkv_keys": keys}) | ({"lmkv": reused} if reused else {})
        return False, told or None

    def has_pending_push_work(self) -> bool:
        """Keep the engine stepping until its saves are reported."""
        return self._the_scheduler.saving

    def has_pending_block_frees(self) -> bool:
        """Held blocks come free soon: rather wait than preempt. Asked when there are too few."""
        return self._the_scheduler.make_room()

    def take_events(self) -> Iterable[KVCacheEvent]:
        """See ``ArenaEvents``."""
        return self._the_scheduler.take_events()

    def reset_cache(self) -> bool | None:
        """Find nothing of other weights than those that the engine has; see ``SchedulerHalf``."""
        self._the_scheduler.reset()
        return True

    @property
    def composer(self) -> Composer | None:
        """For ``vllm.scheduler.rows``: requests that are put together, if this engine does that."""
        anywhere = self._scheduler.anywhere if self._scheduler is not None else None
        return anywhere.composer if anywhere is not None else None

    # -- inside ---------------------------------------------------------------------------------

    @property
    def _publishes_events(self) -> bool:
        events = self._vllm_config.kv_events_config
        return events is not None and events.enable_kv_cache_events

    def _start(self, metadata: Iterable[KVConnectorHandshakeMetadata]) -> None:
        from lmkv_ray.courier import Courier
        from lmkv_ray.vllm.identity.content import ContentThread
        from lmkv_ray.vllm.link.device_watch import DeviceWatch
        from lmkv_ray.vllm.scheduler.anywhere import open_anywhere
        from lmkv_ray.vllm.scheduler.arena_events import ArenaEvents
        from lmkv_ray.vllm.scheduler.half import SchedulerHalf
        from lmkv_ray.vllm.scheduler.startup import open_places

        reports = [report for report in metadata if isinstance(report, LayoutReport)]
        device = DeviceWatch()
        self._courier = Courier(self._settings)
        self._content = ContentThread(self._vllm_config, self._settings)
        places = open_places(
            self._vllm_config,
            self._settings,
            self._groups,
            reports,
            replicas=kv_replicas(self._vllm_config, self._kv_cache_config),
            engine_id=self._engine_id,
            connect=self._find_shard,
            device=device,
            content=self._content,
        )
        links = (link for place in places for link in place.links.values())
        self._links = tuple(dict.fromkeys(links))
        events = ArenaEvents() if self._publishes_events else None

        def anywhere(stats: LmkvStats) -> Anywhere | None:
            return open_anywhere(
                self._vllm_config, self._settings, self._groups, reports, stats, rows=self.rows
            )

        self._scheduler = SchedulerHalf(
            self._settings, self._groups, places, device, events, anywhere
        )
        if self._pool is not None:
            self._scheduler.bind(self._pool)

    def _find_shard(self, host: str | None) -> ShardClient:
        # Once attached, a cache that is gone was stopped by a user: do not start it again.
        first = all(link.attachment is None for link in self._links)
        assert self._courier is not None, "not the engine's half"
        return self._courier.shard(start=first, host=host)

    @property
    def _link(self) -> ShardLink:
        """The one chunks are looked up through."""
        return self._links[0]

    @property
    def _the_worker(self) -> WorkerHalf:
        assert self._worker is not None, "not the worker's half"
        return self._worker

    @property
    def _the_scheduler(self) -> SchedulerHalf:
        assert self._scheduler is not None, "the workers' layouts are not known yet"
        return self._scheduler

    @property
    def _step(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata
