"""Scheduler half: keys, hits, and what to save where. Runs on the engine's thread; never waits.

It looks chunks up in the mapped arena (no RPC), claims only what is in the arena now, and asks the
link for everything else. It holds per request: its chunk keys, how far it is saved, and what must
not be claimed again. Blocks being saved are pinned in vLLM's block pool by reference count, so
that preemption, abort or finish of their request need no special case.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lmkv_ray.config import Settings
from lmkv_ray.keys import KEY_BYTES, KeyArray, chunk_key, key_array, key_list
from lmkv_ray.messages import MissReason
from lmkv_ray.vllm.guard import never_raises
from lmkv_ray.vllm.link import Attachment, GrantedSlot, ShardLink, StageTicket
from lmkv_ray.vllm.metadata import ArenaRef, LoadJob, SaveJob, StepMetadata, WorkerReport
from lmkv_ray.vllm.stats import LmkvStats

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

NOTHING_TO_LOAD: tuple[int | None, bool] = (0, False)
"""``match``'s answer for a miss."""

REMEMBERED_KEYS = 8192
"""Keys this engine lately failed to save."""


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Sizes of this engine's chunks."""

    blocks: int
    """Blocks in a chunk."""
    tokens: int
    """Tokens in a chunk."""
    nbytes: int
    """Bytes of a chunk over all ranks."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What was last answered for a request: chunks ``first`` to ``end`` are in the arena."""

    computed: int
    arena_id: int = 0
    first: int = 0
    end: int = 0
    slots: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Tracked:
    request: Request
    keys: bytes = b""
    saved: int = 0
    """Chunks that need not be considered for saving any more."""
    never_claim_from: int | None = None
    """The first chunk whose load failed: claiming it again could fail again, for ever."""
    ticket: StageTicket | None = None
    claim: _Claim | None = None
    counted: bool = False


@dataclass(frozen=True, slots=True)
class _Saving:
    key: bytes
    slot: int
    blocks: list[int]


class SchedulerHalf:
    """One per engine.

    Args:
        settings: of this engine.
        namespace: digest of the engine's namespace, 16 bytes.
        shape: of its chunks.
        link: to the shard.
        workers: how many workers report each save.
    """

    def __init__(
        self,
        settings: Settings,
        namespace: bytes,
        shape: ChunkShape,
        link: ShardLink,
        *,
        workers: int,
    ) -> None:
        self._settings = settings
        self._namespace = namespace
        self._shape = shape
        self._link = link
        self._workers = workers
        self._pool: BlockPool | None = None
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[LoadJob] = []
        self._new_saves: list[SaveJob] = []
        self._saving: dict[int, _Saving] = {}
        self._reports: dict[int, int] = {}
        self._job_ids = itertools.count()
        self._saving_keys: set[bytes] = set()
        self._dropped: OrderedDict[bytes, None] = OrderedDict()
        self._stats = LmkvStats()

    def bind(self, pool: BlockPool) -> None:
        """Give access to vLLM's block pool, in which blocks being saved are pinned."""
        self._pool = pool

    # -- requests come and go -------------------------------------------------------------------

    @never_raises(None)
    def on_new_request(self, request: Request) -> None:
        """Begin to stage what is neither here nor on the device."""
        tracked = self._track(request)
        arena = self._arena()
        if arena is None or self._link.peers == 0:
            return
        keys = self._keys(tracked)
        if len(keys) and not self._on_device(request, len(keys)):
            self._stage(tracked, keys, arena.reader.lookup(keys).run)

    @never_raises(None)
    def on_finished(self, request: Request, blocks: list[int]) -> None:
        """Save what is left of a request whose blocks are about to be freed."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return
        in_flight = getattr(request, "num_in_flight_tokens", 0)
        computed = min(request.num_computed_tokens - in_flight, len(blocks) * self._block_tokens)
        self._plan_saves(tracked, computed, blocks)
        for key in key_list(self._keys(tracked))[tracked.saved : computed // self._shape.tokens]:
            self._drop(key)

    # -- hits -----------------------------------------------------------------------------------

    @never_raises(NOTHING_TO_LOAD)
    def match(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens after ``computed`` can be loaded, as vLLM asks it.

        Returns:
            (tokens, True) to load asynchronously, (0, False) for nothing, (None, False) to be
            asked again: chunks may still arrive from elsewhere.
        """
        tracked = self._track(request)
        tracked.claim = _Claim(computed)
        arena = self._arena()
        if arena is None:
            return NOTHING_TO_LOAD
        keys = self._keys(tracked)
        if tracked.never_claim_from is not None:
            keys = keys[: tracked.never_claim_from]
        first = computed // self._shape.tokens
        if first >= len(keys):
            return NOTHING_TO_LOAD
        hits = arena.reader.lookup(keys)
        missing = np.flatnonzero(~hits.found[first:])
        end = first + int(missing[0]) if len(missing) else len(keys)
        if end < len(keys) and self._waits(tracked, keys, end):
            return None, False
        tracked.claim = _Claim(
            computed,
            arena.arena_id,
            first,
            end,
            hits.slots[first:end].tolist(),
            hits.generations[first:end].tolist(),
        )
        # Like vLLM's own prefix cache, leave the last token's block to be computed: so a hit is
        # the same computation, to the bit, whichever cache served it.
        most = (request.num_tokens - 1) // self._block_tokens * self._block_tokens
        tokens = min(end * self._shape.tokens, most) - computed
        return (tokens, True) if tokens > 0 else NOTHING_TO_LOAD

    def admitted(self, request: Request, blocks: list[int], tokens: int) -> None:
        """Blocks were allocated; ``tokens`` of the last claim will be loaded."""
        tracked = self._track(request)
        claim = tracked.claim
        if claim is None:
            return
        if not tracked.counted:
            tracked.counted = True
            self._count(tracked, claim, tokens)
        if tokens <= 0:
            return
        size = self._block_tokens
        begin, end = claim.computed // size, (claim.computed + tokens) // size
        self._loads.append(
            LoadJob(
                request_id=request.request_id,
                arena_id=claim.arena_id,
                first_chunk=claim.first,
                slots=claim.slots,
                generations=claim.generations,
                skip=begin - claim.first * self._shape.blocks,
                blocks=blocks[begin:end],
            )
        )
        keys = key_list(self._keys(tracked)[: claim.end])
        tracked.saved = max(tracked.saved, claim.end)
        self._link.touch(keys[::-1])

    # -- every step -----------------------------------------------------------------------------

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """The worker half's orders for this step."""
        state = output.kv_connector_block_state
        for request_id, tokens in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            groups = state.get_block_ids(request_id) if state is not None else None
            if tracked is not None and groups:
                computed = tracked.request.num_computed_tokens + tokens
                self._plan_saves(tracked, computed, groups[0])
        loads, self._loads = self._loads, []
        saves, self._new_saves = self._new_saves, []
        attached = self._link.attachment
        return StepMetadata(
            arena=ArenaRef(attached.path, attached.arena_id) if attached else None,
            loads=loads,
            saves=saves,
            idle=output.total_num_scheduled_tokens == 0,
        )

    def on_report(self, report: WorkerReport) -> None:
        """Commit what the workers saved, give back what they could not."""
        for jobs, good in ((report.saved, True), (report.unsaved, False)):
            for job_id, workers in jobs.items():
                self._saved(job_id, workers, good=good)
        for request_id, chunk in report.failed_loads.items():
            self._stats.add("failed_loads", 1)
            if tracked := self._tracked.get(request_id):
                tracked.never_claim_from = chunk
                tracked.saved = min(tracked.saved, chunk)

    def reset(self) -> None:
        """Forget everything cached in this engine's namespace, here and on all nodes."""
        self._dropped.clear()
        self._link.clear()

    def take_stats(self) -> LmkvStats | None:
        """Counts since the last call."""
        stats, self._stats = self._stats, LmkvStats()
        return None if stats.is_empty() else stats

    @property
    def saving(self) -> bool:
        """Whether saves are under way, and so blocks pinned."""
        return bool(self._saving)

    # -- inside ---------------------------------------------------------------------------------

    @property
    def _block_tokens(self) -> int:
        return self._shape.tokens // self._shape.blocks

    def _track(self, request: Request) -> _Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._tracked[request.request_id] = _Tracked(request)
        return tracked

    def _arena(self) -> Attachment | None:
        return None if self._link.clearing else self._link.attachment

    def _keys(self, tracked: _Tracked) -> KeyArray:
        """Keys of all whole chunks of known tokens, made as they become known."""
        hashes = tracked.request.block_hashes
        known, now = len(tracked.keys) // KEY_BYTES, len(hashes) // self._shape.blocks
        if now > known:
            size = self._shape.blocks
            tracked.keys += b"".join(
                chunk_key(self._namespace, hashes[(i + 1) * size - 1]) for i in range(known, now)
            )
        return key_array(tracked.keys)

    def _on_device(self, request: Request, chunks: int) -> bool:
        """Whether vLLM's own prefix cache holds the last of these chunks."""
        last = request.block_hashes[chunks * self._shape.blocks - 1]
        return self._pool is not None and self._pool.get_cached_block(last, [0]) is not None

    def _waits(self, tracked: _Tracked, keys: KeyArray, end: int) -> bool:
        if tracked.ticket is None:
            self._stage(tracked, keys, end)
        ticket = tracked.ticket
        return ticket is not None and not ticket.over and time.monotonic() < ticket.deadline

    def _stage(self, tracked: _Tracked, keys: KeyArray, end: int) -> None:
        missing = (len(keys) - end) * self._shape.tokens
        within = self._settings.stage_seconds
        if within and self._link.peers and missing >= max(1, self._settings.stage_min_tokens):
            tracked.ticket = self._link.stage(keys[end:].tobytes(), within)

    @never_raises(None)
    def _plan_saves(self, tracked: _Tracked, computed: int, blocks: list[int]) -> None:
        """Order saves of chunks that are complete once ``computed`` tokens are."""
        shape, arena = self._shape, self._arena()
        tokens = computed
        if not self._settings.save_generated:
            tokens = min(tokens, tracked.request.num_prompt_tokens)
        complete = tokens // shape.tokens
        if arena is None or self._pool is None or complete <= tracked.saved:
            return
        keys = self._keys(tracked)
        complete = min(complete, len(keys))
        present = arena.reader.lookup(keys[:complete]).found
        for i in range(tracked.saved, complete):
            key = keys[i].tobytes()
            if not (present[i] or key in self._saving_keys or self._link.committing(key)):
                if len(self._saving) >= self._settings.max_inflight_saves:
                    return  # tried again in this request's next step
                granted = self._link.take_slot()
                if granted is None:
                    return
                self._save(key, granted, blocks[i * shape.blocks : (i + 1) * shape.blocks])
            tracked.saved = i + 1

    def _save(self, key: bytes, granted: GrantedSlot, blocks: list[int]) -> None:
        assert self._pool is not None
        self._pool.touch([self._pool.blocks[b] for b in blocks])
        job = next(self._job_ids)
        self._saving[job] = _Saving(key, granted.slot, blocks)
        self._new_saves.append(
            SaveJob(job, granted.arena_id, granted.slot, blocks, granted.deadline)
        )
        self._saving_keys.add(key)

    def _saved(self, job_id: int, workers: int, *, good: bool) -> None:
        if not good:
            self._reports[job_id] = -self._workers  # one failure spoils the chunk
        self._reports[job_id] = reports = self._reports.get(job_id, 0) + workers
        if reports not in (0, self._workers):
            return
        saving = self._saving.pop(job_id)
        self._saving_keys.discard(saving.key)
        del self._reports[job_id]
        assert self._pool is not None
        self._pool.free_blocks([self._pool.blocks[b] for b in reversed(saving.blocks)])
        if reports:
            self._link.commit(saving.slot, saving.key, self._shape.nbytes)
            self._stats.add("saved_chunks", 1)
        else:
            self._link.release(saving.slot)
            self._drop(saving.key)

    def _drop(self, key: bytes) -> None:
        self._dropped[key] = None
        self._dropped.move_to_end(key)
        if len(self._dropped) > REMEMBERED_KEYS:
            self._dropped.popitem(last=False)
        self._stats.add("dropped_chunks", 1)

    @never_raises(None)
    def _count(self, tracked: _Tracked, claim: _Claim, tokens: int) -> None:
        """Count a new request's hit, and a reason for every token that was not."""
        if tokens:
            self._stats.add("hit_tokens", tokens)
        size = self._shape.tokens
        prompt = tracked.request.num_prompt_tokens
        begin, chunks = (claim.computed + tokens) // size, prompt // size
        tail = prompt - max(chunks * size, claim.computed + tokens)
        if tail > 0:
            self._stats.add_missed(MissReason.TAIL, tail)
        keys = self._keys(tracked)[begin:chunks]
        arena = self._arena()
        if arena is None:
            if len(keys):
                self._stats.add_missed(MissReason.DETACHED, len(keys) * size)
            return
        staged = self._stage_reason(tracked.ticket)
        for key, reason in zip(key_list(keys), arena.reader.reasons(keys), strict=True):
            own = MissReason.SAVE_DROPPED if key in self._dropped else None
            self._stats.add_missed(own or staged or reason, size)

    def _stage_reason(self, ticket: StageTicket | None) -> MissReason | None:
        if ticket is None:
            return None
        if not ticket.over or ticket.reply is None:
            return MissReason.STAGE_TIMEOUT
        reason = ticket.reply.reason
        return None if reason is MissReason.NEVER_STORED else reason
