"""Scheduler half: keeps track of requests, and hands them to ``hits`` and ``saves``.

Runs on the engine's thread; never waits. Whatever goes wrong in here costs the cache, not the
engine: only an order to load, once vLLM counts on it, is never lost (see ``Loader.admitted``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmkv_ray.config import Settings
from lmkv_ray.keys import key_list
from lmkv_ray.vllm.device import DeviceWatch
from lmkv_ray.vllm.events import ArenaEvents
from lmkv_ray.vllm.groups import Group
from lmkv_ray.vllm.guard import never_raises
from lmkv_ray.vllm.hits import NOTHING_TO_LOAD, Loader
from lmkv_ray.vllm.link import ShardLink
from lmkv_ray.vllm.metadata import ArenaRef, StepMetadata, WorkerReport
from lmkv_ray.vllm.pace import Pace
from lmkv_ray.vllm.requests import TrackedRequest
from lmkv_ray.vllm.saves import Saver
from lmkv_ray.vllm.stats import LmkvStats

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Chunks of this engine, and how its workers share them."""

    groups: Sequence[Group]
    nbytes: Sequence[int]
    """Per group: bytes of a chunk over all ranks."""
    offsets: tuple[tuple[int, ...], ...]
    """[worker][group]: where a worker's slice of a chunk begins, in bytes."""


class SchedulerHalf:
    """One per engine.

    Args:
        settings: of this engine.
        namespace: digest of the engine's namespace, 16 bytes.
        shape: of its chunks.
        links: for each group, the link that has slots of its size.
        device: follows what the engine's own cache holds.
        events: who is told of chunks in the arena, if anybody.
    """

    def __init__(
        self,
        settings: Settings,
        namespace: bytes,
        shape: ChunkShape,
        links: Sequence[ShardLink],
        device: DeviceWatch,
        events: ArenaEvents | None = None,
    ) -> None:
        self._namespace = namespace
        self._shape = shape
        self._links = links
        self._stats = LmkvStats()
        self._pace = Pace()
        self._device = device
        self._events = events
        self._saver = Saver(
            settings, shape.groups, links, shape.nbytes, len(shape.offsets), self._stats, events
        )
        self._loader = Loader(
            settings, shape.groups, links, self._stats, self._saver.dropped, self._pace, events
        )
        self._tracked: dict[str, TrackedRequest] = {}

    def bind(self, pool: BlockPool) -> None:
        """Give access to vLLM's block pool: blocks are pinned in it, and looked up."""
        self._saver.pool = self._device.pool = pool

    @never_raises(None)
    def on_new_request(self, request: Request) -> None:
        """Begin to stage what is neither here nor on the device."""
        self._loader.prefetch(self._track(request), self._saver.pool)

    @never_raises(NOTHING_TO_LOAD)
    def match(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """See ``Loader.match``."""
        return self._loader.match(self._track(request), computed)

    def admitted(self, request: Request, tables: Sequence[Sequence[int]], tokens: int) -> None:
        """See ``Loader.admitted``."""
        self._loader.admitted(self._track(request), tables, tokens)

    @never_raises(None)
    def on_finished(self, request: Request, tables: Sequence[Sequence[int]]) -> None:
        """Save what is left of a request whose blocks are about to be freed."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None:
            in_flight = getattr(request, "num_in_flight_tokens", 0)
            self._saver.finish(tracked, request.num_computed_tokens - in_flight, tables)

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """The worker half's orders for this step."""
        self._plan_saves(output)
        self._watch(output)
        return StepMetadata(
            arena=self._arena(),
            loads=self._loader.take_orders(),
            saves=self._saver.take_orders(),
            idle=output.total_num_scheduled_tokens == 0,
        )

    @never_raises(None)
    def on_report(self, report: WorkerReport) -> None:
        """Take in what the workers did."""
        for request_id, token in report.failed_loads.items():
            if tracked := self._tracked.get(request_id):
                tracked.load_failed(token)
            self._stats.add("failed_loads", 1)
        self._saver.settle(report)

    def reset(self) -> None:
        """Forget everything cached in this engine's namespace, here and on all nodes."""
        self._saver.forget_dropped()
        if self._events is not None:
            self._events.cleared()
        for link in self._links:
            link.clear()

    def take_events(self) -> list[KVCacheEvent]:
        """What came to the arena, and left it, since the last call."""
        return self._events.take() if self._events is not None else []

    @never_raises(None)
    def keys_of(self, request: Request) -> list[str] | None:
        """Keys of the prompt's chunks as hex, if the request wants them."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not tracked.wishes.keys:
            return None
        return [
            key.hex()
            for group in self._shape.groups
            for key in key_list(tracked.keys(group)[: request.num_prompt_tokens // group.tokens])
        ]

    def take_stats(self) -> LmkvStats | None:
        """Counts since the last call."""
        if self._stats.is_empty():
            return None
        taken = LmkvStats(data=self._stats.data)
        self._stats.reset()
        return taken

    @property
    def saving(self) -> bool:
        """Whether saves are under way, and so blocks pinned."""
        return self._saver.busy

    @never_raises(None)
    def _arena(self) -> ArenaRef | None:
        attached = self._links[0].attachment
        if attached is None:
            return None
        return ArenaRef(attached.path, attached.arena_id, self._shape.offsets)

    @never_raises(None)
    def _plan_saves(self, output: SchedulerOutput) -> None:
        state = output.kv_connector_block_state
        if state is None:
            return
        for request_id, tokens in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            computed = tracked.request.num_computed_tokens + tokens
            if computed >= tracked.note_at:
                self._device.note(tracked, computed)
            if tables := state.get_block_ids(request_id):
                self._saver.plan(tracked, computed, tables)

    @never_raises(None)
    def _watch(self, output: SchedulerOutput) -> None:
        """Learn how fast the engine is, and what the arena has lost."""
        self._pace.step(
            (request_id, tokens, tracked.request.num_computed_tokens)
            for request_id, tokens in output.num_scheduled_tokens.items()
            if (tracked := self._tracked.get(request_id)) is not None
        )
        arena = self._links[0].readable
        if self._events is not None and arena is not None:
            self._events.check(arena.reader)

    def _track(self, request: Request) -> TrackedRequest:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = TrackedRequest(request, self._namespace, self._shape.groups)
            self._tracked[request.request_id] = tracked
        return tracked
