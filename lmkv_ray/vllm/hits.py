"""Hits: what a request can load, and orders to load it. Runs on the engine's thread; never waits.

Chunks are looked up in the mapped arena (no RPC), and only what is in the arena now is claimed;
the link is asked for everything else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import Hits
from lmkv_ray.config import Settings
from lmkv_ray.keys import key_list
from lmkv_ray.messages import MissReason
from lmkv_ray.vllm.device import device_prefix
from lmkv_ray.vllm.events import ArenaEvents
from lmkv_ray.vllm.groups import Group, hit_alignment, longest_hit
from lmkv_ray.vllm.guard import never_raises
from lmkv_ray.vllm.link import Attachment, ShardLink, StageTicket
from lmkv_ray.vllm.metadata import LoadJob
from lmkv_ray.vllm.pace import Pace
from lmkv_ray.vllm.requests import Claim, FoundChunks, TrackedRequest
from lmkv_ray.vllm.stats import LmkvStats

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

NOTHING_TO_LOAD: tuple[int | None, bool] = (0, False)
"""``match``'s answer for a miss."""


class _Look(NamedTuple):
    """What the arena has for a request."""

    computed: int
    limit: int
    """Tokens of the longest hit there could be."""
    end: int
    """Tokens of the longest hit there is."""
    hits: list[Hits]
    """Per group: its chunks from ``computed`` to ``limit``."""


class Loader:
    """Finds hits and orders their loads.

    Args:
        settings: of this engine.
        groups: of the engine.
        links: for each group, the link that has its slots; chunks are looked up through the first.
        stats: where to count.
        dropped: whether this engine lately failed to save a key.
        pace: how fast this engine computes.
        events: who is told of chunks in the arena, if anybody.
    """

    def __init__(
        self,
        settings: Settings,
        groups: Sequence[Group],
        links: Sequence[ShardLink],
        stats: LmkvStats,
        dropped: Callable[[bytes], bool],
        pace: Pace,
        events: ArenaEvents | None,
    ) -> None:
        self._settings = settings
        self._groups = groups
        self._links = links
        self._link = links[0]
        self._stats = stats
        self._dropped = dropped
        self._pace = pace
        self._events = events
        self._align = hit_alignment(groups)
        self._orders: list[LoadJob] = []

    def prefetch(self, tracked: TrackedRequest, pool: BlockPool | None) -> None:
        """Begin to stage what a new request needs and neither the arena nor the device has."""
        arena, limit = self._link.readable, self._limit(tracked)
        if arena is None or not self._link.peers or limit <= 0:
            return
        hashes = tracked.request.block_hashes
        computed = device_prefix(pool, self._groups, hashes, limit=limit, align=self._align)
        if computed < limit:
            self._stage(tracked, self._look(tracked, arena, computed, limit))

    def match(self, tracked: TrackedRequest, computed: int) -> tuple[int | None, bool]:
        """How many tokens after ``computed`` can be loaded, as vLLM asks it.

        Returns:
            (tokens, True) to load asynchronously, (0, False) for nothing, (None, False) to be
            asked again: chunks may still arrive from elsewhere.
        """
        tracked.claim = Claim(computed, computed)
        arena, limit = self._link.readable, self._limit(tracked)
        if arena is None or limit <= computed:
            return NOTHING_TO_LOAD
        look = self._look(tracked, arena, computed, limit)
        if look.end < limit and self._waits(tracked, look):
            return None, False
        if look.end <= computed:
            return NOTHING_TO_LOAD
        found = []
        for group, hits in zip(self._groups, look.hits, strict=True):
            span = group.span(computed, look.end)
            first = computed // group.tokens
            part = slice(span.start - first, span.start - first + len(span))
            slots, generations = hits.slots[part].tolist(), hits.generations[part].tolist()
            found.append(FoundChunks(group, span.start, slots, generations))
        tracked.claim = Claim(computed, look.end, arena.arena_id, found)
        return look.end - computed, True

    def admitted(
        self, tracked: TrackedRequest, tables: Sequence[Sequence[int]], tokens: int
    ) -> None:
        """Blocks were allocated; ``tokens`` of the last claim will be loaded.

        Args:
            tracked: the request.
            tables: its blocks, per group.
            tokens: what ``match`` answered, or 0.
        """
        claim, request = tracked.claim, tracked.request
        self._count(tracked, tokens)
        if tokens <= 0:
            return
        # vLLM now waits for a load to end, whatever happens here: there must be one.
        try:
            if claim is None or claim.end - claim.computed != tokens:
                raise ValueError(f"{tokens} tokens are to be loaded, {claim} was answered")
            orders = [_order(request, claim, found, tables) for found in claim.found]
        except Exception:
            logger.exception("lmkv_ray: a load was not ordered; its tokens are recomputed")
            begin, size = claim.computed if claim else 0, self._groups[0].block_tokens
            blocks = tables[0][begin // size : -(-(begin + tokens) // size)]
            self._orders.append(LoadJob.lost(request.request_id, list(blocks)))
            return
        self._orders += orders
        self._ordered(tracked, claim)

    def take_orders(self) -> list[LoadJob]:
        """Loads to begin in this step."""
        orders, self._orders = self._orders, []
        return orders

    @never_raises(None)
    def _ordered(self, tracked: TrackedRequest, claim: Claim) -> None:
        """What is being loaded was used, and need not be saved."""
        for group, link in zip(self._groups, self._links, strict=True):
            end = -(-claim.end // group.tokens)
            if self._events is not None:
                self._events.stored(tracked, group, group.span(0, claim.end))
            tracked.saved[group.number] = max(tracked.saved[group.number], end)
            link.touch(key_list(tracked.keys(group)[group.span(0, claim.end).start : end])[::-1])

    # -- what is there --------------------------------------------------------------------------

    def _limit(self, tracked: TrackedRequest) -> int:
        """Tokens that a hit can have at most.

        Like vLLM's own prefix cache, leave the last token's block to be computed: so a hit is the
        same computation, to the bit, whichever cache served it.
        """
        request = tracked.request
        limits = [len(tracked.keys(group)) * group.tokens for group in self._groups]
        limits.append(request.num_tokens - 1)
        if tracked.never_past is not None:
            limits.append(tracked.never_past)
        return min(limits) // self._align * self._align

    def _look(self, tracked: TrackedRequest, arena: Attachment, computed: int, limit: int) -> _Look:
        hits = [
            arena.reader.lookup(
                tracked.keys(group)[computed // group.tokens : -(-limit // group.tokens)]
            )
            for group in self._groups
        ]
        end = longest_hit(
            self._groups,
            [its.found for its in hits],
            computed=computed,
            limit=limit,
            align=self._align,
        )
        return _Look(computed, limit, end, hits)

    # -- what may come from elsewhere -----------------------------------------------------------

    def _waits(self, tracked: TrackedRequest, look: _Look) -> bool:
        if not tracked.tickets:
            self._stage(tracked, look)
        now = time.monotonic()
        return any(not ticket.over and now < ticket.deadline for ticket in tracked.tickets)

    def _stage(self, tracked: TrackedRequest, look: _Look) -> None:
        """Ask for what a hit of ``look.limit`` tokens lacks."""
        within = self._settings.stage_seconds
        missing = look.limit - look.end
        if not (within and self._link.peers and missing >= max(1, self._settings.stage_min_tokens)):
            return
        for group, link, hits in zip(self._groups, self._links, look.hits, strict=True):
            span = group.span(look.computed, look.limit)
            found = hits.found[span.start - look.computed // group.tokens :]
            if found.all():
                continue
            first = span.start + int(np.argmin(found))
            keys = tracked.keys(group)[first : span.stop]
            remaining = self._remaining(tracked, group, first, len(keys))
            if ticket := link.stage(keys.tobytes(), within, remaining):
                tracked.tickets.append(ticket)

    def _remaining(
        self, tracked: TrackedRequest, group: Group, first: int, chunks: int
    ) -> list[float]:
        """What it takes to compute if so many chunks come: for the choice between both.

        Not with several groups, where one stage alone decides nothing.
        """
        if self._settings.load_when == "always" or len(self._groups) > 1:
            return []
        begin = first * group.tokens
        return self._pace.remaining(tracked.request.num_tokens, begin, group.tokens, chunks)

    # -- counting -------------------------------------------------------------------------------

    @never_raises(None)
    def _count(self, tracked: TrackedRequest, tokens: int) -> None:
        """Count a new request's hit, and a reason for every token that was not."""
        claim = tracked.claim
        if tracked.counted or claim is None:
            return
        tracked.counted = True
        if tokens:
            self._stats.add("hit_tokens", tokens)
        size = self._groups[0].tokens
        prompt = tracked.request.num_prompt_tokens
        begin, chunks = (claim.computed + tokens) // size, prompt // size
        tail = prompt - max(chunks * size, claim.computed + tokens)
        if tail > 0:
            self._stats.add_missed(MissReason.TAIL, tail)
        if begin >= chunks:
            return
        arena = self._link.readable
        if arena is None:
            self._stats.add_missed(MissReason.DETACHED, (chunks - begin) * size)
            return
        staged = _why_not_staged(tracked.tickets)
        keys = key_list(tracked.keys(self._groups[0])[begin:chunks])
        ends = np.arange(begin + 1, chunks + 1) * size
        for key, reason in zip(keys, self._reasons(tracked, arena, ends), strict=True):
            own = MissReason.SAVE_DROPPED if self._dropped(key) else None
            self._stats.add_missed(own or staged or reason, size)

    def _reasons(
        self, tracked: TrackedRequest, arena: Attachment, ends: npt.NDArray[np.int64]
    ) -> list[MissReason]:
        """Why the chunks that hold these tokens' ends are missing: the first group that knows."""
        reasons = [MissReason.NEVER_STORED] * len(ends)
        for group in self._groups:
            keys = tracked.keys(group)
            if len(keys):
                its = arena.reader.reasons(
                    keys[np.minimum(-(-ends // group.tokens), len(keys)) - 1]
                )
                known = zip(reasons, its, strict=True)
                reasons = [b if a is MissReason.NEVER_STORED else a for a, b in known]
        return reasons


def _order(
    request: Request, claim: Claim, found: FoundChunks, tables: Sequence[Sequence[int]]
) -> LoadJob:
    group = found.group
    first, end = group.first_block(claim.computed, claim.end), claim.end // group.block_tokens
    blocks = list(tables[group.number][first:end])
    if len(blocks) != max(0, end - first):
        raise ValueError(f"group {group.number} has too few blocks for {claim.end} tokens")
    return LoadJob(
        request_id=request.request_id,
        arena_id=claim.arena_id,
        group=group.number,
        first_chunk=found.first,
        slots=found.slots,
        generations=found.generations,
        skip=max(0, first - found.first * group.blocks),
        blocks=blocks,
    )


def _why_not_staged(tickets: Sequence[StageTicket]) -> MissReason | None:
    for ticket in tickets:
        if not ticket.over or ticket.reply is None:
            return MissReason.STAGE_TIMEOUT
        if ticket.reply.reason not in (None, MissReason.NEVER_STORED):
            return ticket.reply.reason
    return None
