"""Scheduler half: keeps track of requests, and hands them to ``hits`` and ``saves``.

Runs on the engine's thread; never waits. Whatever goes wrong in here costs the cache, not the
engine: only an order to load, once vLLM counts on it, is never lost (see ``Loader.admitted``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lmkv_ray.config import Settings
from lmkv_ray.keys import key_list
from lmkv_ray.messages import MissReason
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.guard import never_raises
from lmkv_ray.vllm.engine.metadata import StepMetadata, WorkerReport
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.engine.versions import BlockTables
from lmkv_ray.vllm.identity.adapters import Adapters
from lmkv_ray.vllm.identity.generation import Generation
from lmkv_ray.vllm.link.device_watch import DeviceWatch
from lmkv_ray.vllm.scheduler.anywhere import Anywhere
from lmkv_ray.vllm.scheduler.arena_events import ArenaEvents
from lmkv_ray.vllm.scheduler.hits import NOTHING_TO_LOAD, Loader
from lmkv_ray.vllm.scheduler.own_cache import OwnCache
from lmkv_ray.vllm.scheduler.pace import Pace
from lmkv_ray.vllm.scheduler.places import Place
from lmkv_ray.vllm.scheduler.requests import TrackedRequest
from lmkv_ray.vllm.scheduler.saves import Saver
from lmkv_ray.vllm.scheduler.wishes import WishReader

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class SchedulerHalf:
    """One per engine.

    Args:
        settings: of this engine.
        groups: of its chunks.
        places: the nodes of its workers, its own first.
        device: follows what the engine's own cache holds.
        events: is told of chunks in the arena; None: nothing is.
        anywhere: makes, of the counters of this half, what puts requests together, if anything.
    """

    def __init__(
        self,
        settings: Settings,
        groups: Sequence[Group],
        places: Sequence[Place],
        device: DeviceWatch,
        events: ArenaEvents | None = None,
        anywhere: Callable[[LmkvStats], Anywhere | None] = lambda _: None,
    ) -> None:
        self._groups = groups
        self._places = places
        self._identity = places[0].identity
        self._link = places[0].link
        self._stats = LmkvStats()
        self.anywhere = anywhere(self._stats)
        """Puts requests together from stored text, if this engine does."""
        self._pace = Pace()
        self._device = device
        self._own = OwnCache()
        workers = sum(len(place.shares) for place in places)
        self._generation = Generation(self._identity, workers)
        self._adapters = Adapters(workers)
        self._events = events
        job_ids = itertools.count()
        self._savers = [
            Saver(settings, groups, place, job_ids, self._stats, None if place.number else events)
            for place in places
        ]
        dropped = self._savers[0].dropped
        self._loader = Loader(settings, groups, places, self._stats, dropped, self._pace, events)
        self._wishes = WishReader(lambda: self._stats.add("refused_hints", 1))
        self._tracked: dict[str, TrackedRequest] = {}
        self._asking: set[str] = set()
        """Requests that vLLM tried to admit in this step, and has not admitted yet."""
        self._tables = BlockTables()

    def bind(self, pool: BlockPool) -> None:
        """Give access to vLLM's block pool: blocks are held in it, and looked up."""
        self._device.pool = pool
        self._own.bind(pool)
        for saver in self._savers:
            saver.pool = pool

    @never_raises(None)
    def on_new_request(self, request: Request) -> None:
        """Begin to stage what is neither here nor on the device."""
        self._adopt()
        tracked = self._track(request)
        self._loader.prefetch(tracked, self._savers[0].pool)
        self._compose(tracked)

    @never_raises(NOTHING_TO_LOAD)
    def match(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """See ``Loader.match``; asked again while the weights are being checked."""
        self._notice()
        reads = not request.skip_reading_prefix_cache
        if reads and not self._identity.known and self._generation.wanted():
            return None, False
        tracked = self._track(request)
        if self._compose(tracked):
            return None, False  # its blocks have other names now: let vLLM look them up
        tracked.mixed = computed > 0 and self._own.stale(_adapter_name(request))
        tracked.forget_noted()
        answer = self._loader.match(tracked, computed)
        if self.anywhere is not None:
            answer = self.anywhere.claim(tracked, computed, answer)
        if answer[0] is not None:
            self._asking.add(request.request_id)
        return answer

    def admitted(self, request: Request, tables: Sequence[Sequence[int]], tokens: int) -> None:
        """See ``Loader.admitted``."""
        self._asking.discard(request.request_id)
        if (tracked := self._tracked.get(request.request_id)) is not None:  # else nothing is loaded
            self._loader.admitted(tracked, tables, tokens)
            if self.anywhere is not None and tokens:
                self.anywhere.admitted(tracked)

    @never_raises(None)
    def on_finished(self, request: Request, tables: Sequence[Sequence[int]]) -> None:
        """Save what is left of a request whose blocks are about to be freed."""
        tracked = self._tracked.pop(request.request_id, None)
        self._tables.forget(request.request_id)
        if tracked is not None:
            in_flight = getattr(request, "num_in_flight_tokens", 0)
            if self.anywhere is not None and (pool := self._savers[0].pool) is not None:
                pool.evict_blocks(self.anywhere.finished(tracked, tables))
            for saver in self._savers:
                saver.finish(tracked, request.num_computed_tokens - in_flight, tables)

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """The worker half's orders for this step."""
        self._adopt()
        if self._asking:  # there were too few blocks for them
            self.make_room()
            self._asking.clear()
        for saver in self._savers:
            saver.resume()
        self._plan_saves(output)
        self._watch(output)
        return StepMetadata(
            arenas=tuple(place.arena() for place in self._places),
            loads=self._loader.take_orders(),
            moves=self._loader.take_moves(),
            saves=[order for saver in self._savers for order in saver.take_orders()],
            idle=output.total_num_scheduled_tokens == 0,
            check=self._generation.order(),
            adapters=self._adapters.serials(),
        )

    @never_raises(None)
    def on_report(self, report: WorkerReport) -> None:
        """Take in what the workers did."""
        if self._generation.take(report):
            self._mix()
        if loaded := self._adapters.take(report):
            for saver in self._savers:  # whose request has ended is not renewed
                saver.give_up()
            for other in self._tracked.values():
                if other.adapter_id in loaded:
                    self._renew(other)
        self._adopt()
        for request_id, token in report.failed_loads.items():
            if tracked := self._tracked.get(request_id):
                lost = tracked.load_failed(token)
                if self.anywhere is not None:
                    self.anywhere.failed(tracked)
                self._stats.add_missed(MissReason.LOAD_FAILED, lost)
            self._stats.add("failed_loads", 1)
        for saver in self._savers:
            saver.settle(report)

    def reset(self) -> None:
        """From now on find only what belongs to the weights that the workers have in memory.

        They are read before the next lookup. Nothing is removed: what belongs to other weights is
        not found by this engine, and may be what other engines need.
        """
        self._generation.doubt()

    def take_events(self) -> list[KVCacheEvent]:
        """What came to the arena, and left it, since the last call."""
        return self._events.take() if self._events is not None else []

    @never_raises(None)
    def keys_of(self, request: Request) -> list[str] | None:
        """Keys of the prompt's chunks as hex, if the request wants them."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not tracked.wishes.keys or not tracked.known:
            return None
        return [
            key.hex()
            for place in self._places
            for group in self._groups
            if group.number in place.links
            for key in key_list(
                tracked.keys(group, place.number)[: request.num_prompt_tokens // group.tokens]
            )
        ]

    @never_raises(None)
    def reused_by(self, request: Request) -> dict[str, int] | None:
        """For its answer: what was reused of a request that was put together, and recomputed."""
        tracked = self._tracked.get(request.request_id)
        composed = tracked.composed if tracked is not None else None
        if composed is None or composed.plan is None or composed.over:
            return None
        return {"reused": composed.plan.reused, "recomputed": composed.plan.recomputed}

    def take_stats(self) -> LmkvStats | None:
        """Counts since the last call."""
        return self._stats.take()

    def make_room(self) -> bool:
        """Free what only waits to be saved: vLLM wants blocks. Whether some come free soon."""
        gave_up = [saver.give_up() for saver in self._savers]
        return any(gave_up) or self.saving

    @property
    def saving(self) -> bool:
        """Whether saves are under way whose report is worth stepping, and waiting, for."""
        return any(saver.busy for saver in self._savers)

    def _compose(self, tracked: TrackedRequest) -> bool:
        """Put a request together, once its engine is known; whether it just was."""
        if self.anywhere is None or tracked.considered or not tracked.known:
            return False
        tracked.considered = True
        if self.anywhere.wants(tracked):
            exact = self._loader.exact(tracked, self._savers[0].pool)
            self.anywhere.compose(tracked, exact)
        return tracked.composed is not None

    @never_raises(None)
    def _plan_saves(self, output: SchedulerOutput) -> None:
        state = output.kv_connector_block_state
        if state is None:
            return
        if output.num_scheduled_tokens and not self._identity.known:
            self._generation.wanted()
        tables_of = self._tables.now(state)
        for request_id, tokens in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None or tracked.mixed or not tracked.known:
                continue
            computed = tracked.request.num_computed_tokens + tokens
            if computed >= tracked.note_at:
                self._device.note(tracked.runs_to_note(computed))
            if tables := tables_of(request_id):
                for saver in self._savers:
                    saver.plan(tracked, computed, tables)

    @never_raises(None)
    def _watch(self, output: SchedulerOutput) -> None:
        """Learn how fast the engine is, and what the arena has lost."""
        self._pace.step(
            (request_id, tokens, tracked.request.num_computed_tokens)
            for request_id, tokens in output.num_scheduled_tokens.items()
            if (tracked := self._tracked.get(request_id)) is not None
        )
        reader = self._link.readable
        if self._events is not None and reader is not None:
            self._events.check(reader)

    @never_raises(None)
    def _adopt(self) -> None:
        """Go over to what is known of the engine's identity by now; never within a schedule."""
        self._notice()
        if not self._identity.adopt():
            return
        for tracked in self._tracked.values():
            tracked.start_over()
        if self._identity.age > 1:
            self._mix()
        self._device.rename()
        if self._events is not None:
            self._events.cleared()
        for saver, place in zip(self._savers, self._places, strict=True):
            saver.forget_dropped()
            for link in place.links.values():
                number = place.number
                link.rename(self._identity.space(number), self._identity.fields(number))
        names = " ".join(namespace.hex() for namespace in self._identity.namespaces)
        logger.info("lmkv_ray: age %d, namespace %s", self._identity.age, names)

    def _renew(self, tracked: TrackedRequest) -> None:
        """The adapter of a request was loaded, or let go of."""
        before, after = tracked.adapter, self._adapters.digest(tracked.adapter_id)
        if before == after:
            return
        on_top = tracked.claim is not None and tracked.claim.computed > 0
        name = _adapter_name(tracked.request)
        if after is not None and self._adapters.replaces(name, after):
            self._own.grow_stale(name)
        tracked.mixed |= before is not None or (on_top and self._own.stale(name))
        tracked.start_over()
        tracked.adapter = after

    def _mix(self) -> None:
        """What has been computed so far, and what is computed on top of it, is of no age."""
        self._own.grow_stale()
        for saver in self._savers:
            saver.give_up()
        for tracked in self._tracked.values():
            tracked.mixed = True

    def _notice(self) -> None:
        if self._own.emptied():
            self._generation.doubt()

    def _track(self, request: Request) -> TrackedRequest:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            wishes = self._wishes.read(getattr(request, "kv_transfer_params", None))
            tracked = TrackedRequest(request, self._identity, self._groups, wishes)
            self._tracked[request.request_id] = tracked
            if tracked.adapter_id:
                tracked.adapter = None
                self._renew(tracked)
        return tracked


def _adapter_name(request: Request) -> str:
    lora = request.lora_request
    return lora.lora_name if lora is not None else ""
