"""Saves: which chunks to keep, in which slots, and when their blocks may go.

Runs on the engine's thread; never waits. Blocks being saved are pinned in vLLM's block pool by
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
from lmkv_ray.vllm.events import ArenaEvents
from lmkv_ray.vllm.groups import Bools, Group
from lmkv_ray.vllm.guard import never_raises
from lmkv_ray.vllm.metadata import SaveJob, WorkerReport
from lmkv_ray.vllm.places import Place
from lmkv_ray.vllm.requests import TrackedRequest
from lmkv_ray.vllm.slots import GrantedSlot
from lmkv_ray.vllm.stats import LmkvStats

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

REMEMBERED_KEYS = 8192
"""Keys this engine lately failed to save."""

REPORT_SECONDS = 10.0
"""That saves may go without a sign of life before vLLM is let rest: an engine without requests
that waits for a report steps as fast as it can. The blocks stay pinned, for a copy may be under
way, until a report comes with a later request."""


@dataclass(slots=True)
class _Saving:
    key: bytes
    group: Group
    slot: GrantedSlot
    blocks: list[int]
    unreported: int
    """Workers whose report is still to come: until then they may write."""
    tracked: TrackedRequest
    chunk: int
    age: int
    """Of the engine's identity when its blocks were computed."""
    adapter: bytes | None
    """What they were computed with."""
    good: bool = True


class Saver:
    """Orders the saves of one place, and commits what its workers saved.

    Args:
        settings: of this engine.
        groups: of the engine.
        place: whose.
        job_ids: of saves, unique over all places.
        stats: where to count.
        events: who is told of chunks in the arena, if anybody.
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
        self._job_ids = job_ids
        self._dropped: OrderedDict[bytes, None] = OrderedDict()
        self.pool: BlockPool | None = None
        """vLLM's block pool; nothing is saved without it."""

    @property
    def busy(self) -> bool:
        """Whether saves are under way whose report is worth stepping, and waiting, for."""
        return bool(self._saving) and self._clock() < self._expected_by

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
        """Order the last saves of a request whose blocks are about to be freed."""
        sizes = [
            len(table) * group.block_tokens
            for group, table in zip(self._groups, tables, strict=True)
        ]
        computed = min(computed, *sizes)
        self.plan(tracked, computed, tables)
        if tracked.mixed or not tracked.known:
            return
        for group in self._groups:
            if not self._lacks(tracked, group, computed // group.tokens):
                continue
            saved, keys = tracked.saved[self._place.number], tracked.keys(group, self._place.number)
            for key in key_list(keys[saved[group.number] : computed // group.tokens]):
                self._drop(key)

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
        slots, saved = self._place.links[group.number].slots, tracked.saved[self._place.number]
        begin = saved[group.number]
        keys = tracked.keys(group, self._place.number)[begin:complete]
        present = self._present(tracked, group, begin, keys)
        if present is None or self.pool is None:
            return
        null = self.pool.null_block.block_id
        for i, key in enumerate(key_list(keys)):
            if not (present[i] or key in self._saving_keys or slots.committing(key)):
                at = (begin + i) * group.blocks
                blocks = list(table[at : at + group.blocks])
                # Behind the window there are no blocks any more.
                if group.full or null not in blocks:
                    if len(self._saving) >= self._settings.max_inflight_saves:
                        return  # tried again in this request's next step
                    granted = slots.take()
                    if granted is None:
                        return
                    self._order(tracked, group, begin + i, granted, blocks)
            saved[group.number] = begin + i + 1

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

    def _order(
        self,
        tracked: TrackedRequest,
        group: Group,
        chunk: int,
        granted: GrantedSlot,
        blocks: list[int],
    ) -> None:
        assert self.pool is not None
        place = self._place
        key = tracked.keys(group, place.number)[chunk].tobytes()
        self.pool.touch([self.pool.blocks[b] for b in blocks])
        self._expected_by = self._clock() + REPORT_SECONDS
        job = next(self._job_ids)
        workers = len(place.shares)
        age, adapter = tracked.identity.age, tracked.adapter
        self._saving[job] = _Saving(
            key, group, granted, blocks, workers, tracked, chunk, age, adapter
        )
        slot, arena_id, deadline = granted
        self._orders.append(
            SaveJob(
                job,
                group.number,
                arena_id,
                slot,
                blocks,
                deadline,
                place.number,
                tracked.adapter_id,
            )
        )
        self._saving_keys.add(key)

    @never_raises(None)
    def _settle(self, job_id: int, workers: int, *, good: bool) -> None:
        saving = self._saving[job_id]
        self._expected_by = self._clock() + REPORT_SECONDS
        saving.unreported -= workers
        saving.good &= good
        if saving.unreported > 0:
            return
        del self._saving[job_id]
        self._saving_keys.discard(saving.key)
        assert self.pool is not None
        self.pool.free_blocks([self.pool.blocks[b] for b in reversed(saving.blocks)])
        place, number = self._place, saving.group.number
        slots, identity = place.links[number].slots, place.identity
        same = saving.age == identity.age and saving.adapter == saving.tracked.adapter
        if not (identity.known and same):
            slots.release(saving.slot)
        elif saving.good:
            hints = saving.tracked.hints(saving.group, saving.chunk, place.number)
            slots.commit(saving.slot, saving.key, place.nbytes[number], hints)
            self._dropped.pop(saving.key, None)
            self._stats.add("saved_chunks", 1)
            if self._events is not None:
                self._events.stored(saving.tracked, saving.group, [saving.chunk])
        else:
            slots.release(saving.slot)
            self._drop(saving.key)

    def _drop(self, key: bytes) -> None:
        self._dropped[key] = None
        self._dropped.move_to_end(key)
        if len(self._dropped) > REMEMBERED_KEYS:
            self._dropped.popitem(last=False)
        self._stats.add("dropped_chunks", 1)
