"""Saves: which chunks to keep, in which slots, and when their blocks may go.

Runs on the engine's thread; never waits. Blocks being saved are held in vLLM's block pool by
reference count, so that preemption, abort or finish of their request need no special case.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lmkv_ray.config import Settings
from lmkv_ray.keys import KeyArray, key_list
from lmkv_ray.vllm.engine.groups import Bools, Group
from lmkv_ray.vllm.engine.guard import never_raises
from lmkv_ray.vllm.engine.metadata import SaveJob, WorkerReport
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.link.slots import GrantedSlot
from lmkv_ray.vllm.scheduler.arena_events import ArenaEvents
from lmkv_ray.vllm.scheduler.places import Place
from lmkv_ray.vllm.scheduler.requests import TrackedRequest
from lmkv_ray.vllm.scheduler.save_queue import WaitingSaves, Wanted

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

    from lmkv_ray.vllm.link.shard_link import ShardLink

REMEMBERED_KEYS = 8192
"""Keys this engine lately failed to save."""

REPORT_SECONDS = 10.0
"""That saves may go without a sign of life before vLLM is let rest: an engine without requests
that waits for a report steps as fast as it can. The blocks stay held, for a copy may be under
way, until a report comes with a later request."""


@dataclass(slots=True)
class _Saving:
    wanted: Wanted
    slot: GrantedSlot
    unreported: int
    """Workers whose report is still to come: until then they may write."""
    good: bool = True


class Saver:
    """Orders the saves of one place, and commits what its workers saved.

    Args:
        settings: of this engine.
        groups: the engine's KV groups, in its order.
        place: the node of the engine whose chunks are saved.
        job_ids: of saves, unique over all places.
        stats: where to count.
        events: is told of chunks in the arena; None: nothing is.
        clock: seconds that pass.
    """

    def __init__(
        self,
        settings: Settings,
        groups: Sequence[Group],
        place: Place,
        job_ids: Iterator[int],
        stats: LmkvStats,
        events: ArenaEvents | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._groups = groups
        self._place = place
        self._stats = stats
        self._events = events
        self._clock = clock
        self._expected_by = 0.0
        self._orders: list[SaveJob] = []
        self._saving: dict[int, _Saving] = {}
        self._saving_keys: set[bytes] = set()
        self._waiting = WaitingSaves(clock)
        self._job_ids = job_ids
        self._dropped: OrderedDict[bytes, None] = OrderedDict()
        self.pool: BlockPool | None = None
        """vLLM's block pool; nothing is saved without it."""

    @property
    def busy(self) -> bool:
        """Whether saves are under way whose report is worth stepping, and waiting, for."""
        reporting = bool(self._saving) and self._clock() < self._expected_by
        return reporting or bool(self._waiting)

    def dropped(self, key: bytes) -> bool:
        """Whether this engine lately failed to save a key."""
        return key in self._dropped

    def forget_dropped(self) -> None:
        """The cache was emptied: nothing is missing because of us."""
        self._dropped.clear()

    @never_raises(None)
    def plan(self, tracked: TrackedRequest, computed: int, tables: Sequence[Sequence[int]]) -> None:
        """Order saves of a request's chunks that are complete once ``computed`` tokens are.

        Args:
            tracked: the request.
            computed: tokens whose KV there will be after this step.
            tables: the request's blocks, per group.
        """
        if tracked.mixed or not tracked.known:
            return
        if not self._settings.save_generated:
            computed = min(computed, tracked.request.num_prompt_tokens)
        for group, table in zip(self._groups, tables, strict=True):
            if self._lacks(tracked, group, computed // group.tokens):
                self._plan_group(tracked, group, computed // group.tokens, table)

    @never_raises(None)
    def finish(
        self, tracked: TrackedRequest, computed: int, tables: Sequence[Sequence[int]]
    ) -> None:
        """Order the last saves of a request that ends, or let them wait."""
        sizes = [
            len(table) * group.block_tokens
            for group, table in zip(self._groups, tables, strict=True)
        ]
        computed = min(computed, *sizes)
        self.plan(tracked, computed, tables)
        if tracked.mixed or not tracked.known:
            return
        for group, table in zip(self._groups, tables, strict=True):
            if self._lacks(tracked, group, computed // group.tokens):
                self._wait(tracked, group, computed // group.tokens, table)

    @never_raises(None)
    def resume(self) -> None:
        """Order what can be ordered of the saves that wait."""
        identity = self._place.identity
        while self._waiting and self.pool is not None:
            wanted = self._waiting.first()
            link = self._place.links[wanted.group.number]
            outdated = not identity.known or wanted.age != identity.age
            if outdated or link.attachment is None or self._waiting.hopeless:
                self.give_up()
            elif self._is_under_way(wanted.key, link) or self._order(wanted):
                self._waiting.pop(self.pool)
            else:
                return

    @never_raises(False)
    def give_up(self) -> bool:
        """Nothing waits to be saved any more, so that its blocks are free; whether anything did."""
        gave_up = bool(self._waiting)
        while self._waiting and self.pool is not None:
            self._drop(self._waiting.pop(self.pool).key)
        return gave_up

    def _lacks(self, tracked: TrackedRequest, group: Group, complete: int) -> bool:
        """Whether there are chunks to consider among the first ``complete`` ones."""
        place = self._place
        return group.number in place.links and complete > tracked.saved[place.number][group.number]

    def take_orders(self) -> list[SaveJob]:
        """Saves to begin after this step."""
        orders, self._orders = self._orders, []
        return orders

    def settle(self, report: WorkerReport) -> None:
        """Commit what all workers saved, give back what one could not."""
        for jobs, good in ((report.saved, True), (report.unsaved, False)):
            for job_id, workers in jobs.items():
                if job_id in self._saving:
                    self._settle(job_id, workers, good=good)

    @never_raises(None)
    def _plan_group(
        self, tracked: TrackedRequest, group: Group, complete: int, table: Sequence[int]
    ) -> None:
        saved = tracked.saved[self._place.number]
        # With asynchronous scheduling more is computed than is known of what was generated.
        complete = min(complete, len(tracked.keys(group, self._place.number)))
        missing = self._missing(tracked, group, complete, table)
        if missing is None:
            return
        for wanted in missing:
            saved[group.number] = wanted.chunk
            if not self._order(wanted):
                return  # tried again in this request's next step
        saved[group.number] = max(saved[group.number], complete)

    @never_raises(None)
    def _wait(
        self, tracked: TrackedRequest, group: Group, complete: int, table: Sequence[int]
    ) -> None:
        """What could not be ordered before its request ended is ordered after it."""
        missing = self._missing(tracked, group, complete, table)
        if missing is None or self.pool is None:
            keys = tracked.keys(group, self._place.number)
            for key in key_list(keys[tracked.saved[self._place.number][group.number] : complete]):
                self._drop(key)
            return
        for wanted in missing:
            if not self._waiting.add(wanted, self.pool):
                self._drop(wanted.key)

    def _missing(
        self, tracked: TrackedRequest, group: Group, complete: int, table: Sequence[int]
    ) -> Iterator[Wanted] | None:
        """Of the first ``complete`` chunks those that were not considered before, and are neither
        there nor on their way; None: there is no arena.
        """
        begin = tracked.saved[self._place.number][group.number]
        keys = tracked.keys(group, self._place.number)[begin:complete]
        present = self._present(tracked, group, begin, keys)
        if present is None or self.pool is None:
            return None
        null, link = self.pool.null_block.block_id, self._place.links[group.number]

        def missing() -> Iterator[Wanted]:
            for chunk, key in enumerate(key_list(keys), begin):
                if not (present[chunk - begin] or self._is_under_way(key, link)):
                    blocks = list(table[chunk * group.blocks : (chunk + 1) * group.blocks])
                    # Behind the window there are no blocks any more.
                    if key not in self._waiting and (group.full or null not in blocks):
                        yield Wanted.of(tracked, group, chunk, key, blocks)

        return missing()

    def _is_under_way(self, key: bytes, link: ShardLink) -> bool:
        return key in self._saving_keys or link.slots.committing(key)

    def _present(
        self, tracked: TrackedRequest, group: Group, begin: int, keys: KeyArray
    ) -> Bools | None:
        """Which chunks from ``begin`` on are there already, as far as is known; None: no arena."""
        link = self._place.links[group.number]
        if link.attachment is None:
            return None
        if (reader := link.readable) is not None:
            return reader.lookup(keys).found
        if tracked.asked is None:
            return np.zeros(len(keys), np.bool_)
        return tracked.asked.found(self._place.number, group, begin, begin + len(keys)).found

    def _order(self, wanted: Wanted) -> bool:
        """Order a save; False: not now, as too many are under way, or there is no slot."""
        assert self.pool is not None
        place, number = self._place, wanted.group.number
        if len(self._saving) >= self._settings.max_inflight_saves:
            return False
        if (granted := place.links[number].slots.take()) is None:
            return False
        self.pool.touch([self.pool.blocks[b] for b in wanted.blocks])
        self._expected_by = self._clock() + REPORT_SECONDS
        job = next(self._job_ids)
        self._saving[job] = _Saving(wanted, granted, len(place.shares))
        slot, arena_id, deadline = granted
        adapter, blocks = wanted.tracked.adapter_id, wanted.blocks
        self._orders.append(
            SaveJob(job, number, arena_id, slot, blocks, deadline, place.number, adapter)
        )
        self._saving_keys.add(wanted.key)
        return True

    @never_raises(None)
    def _settle(self, job_id: int, workers: int, *, good: bool) -> None:
        saving = self._saving[job_id]
        self._expected_by = self._clock() + REPORT_SECONDS
        saving.unreported -= workers
        saving.good &= good
        if saving.unreported > 0:
            return
        del self._saving[job_id]
        wanted = saving.wanted
        self._saving_keys.discard(wanted.key)
        assert self.pool is not None
        self.pool.free_blocks([self.pool.blocks[b] for b in reversed(wanted.blocks)])
        place, number = self._place, wanted.group.number
        slots, identity = place.links[number].slots, place.identity
        same = wanted.age == identity.age and wanted.adapter == wanted.tracked.adapter
        if not (identity.known and same):
            slots.release(saving.slot)
        elif saving.good:
            hints = wanted.tracked.hints(wanted.group, wanted.chunk, place.number)
            slots.commit(saving.slot, wanted.key, place.nbytes[number], hints)
            self._dropped.pop(wanted.key, None)
            self._stats.add("saved_chunks", 1)
            if self._events is not None:
                self._events.stored(wanted.tracked, wanted.group, [wanted.chunk])
        else:
            slots.release(saving.slot)
            self._drop(wanted.key)

    def _drop(self, key: bytes) -> None:
        self._dropped[key] = None
        self._dropped.move_to_end(key)
        if len(self._dropped) > REMEMBERED_KEYS:
            self._dropped.popitem(last=False)
        self._stats.add("dropped_chunks", 1)
