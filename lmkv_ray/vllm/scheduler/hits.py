"""Hits: what a request can load, and orders to load it. Runs on the engine's thread; never waits.

Chunks are looked up in the mapped arena (no RPC), and only what is in the arena now is claimed;
the link is asked for everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmkv_ray.anywhere.plan import Plan
from lmkv_ray.arena import ArenaReader
from lmkv_ray.config import Settings
from lmkv_ray.keys import key_list
from lmkv_ray.vllm.engine.groups import Bools, Group, hit_alignment, longest_hit
from lmkv_ray.vllm.engine.guard import never_raises
from lmkv_ray.vllm.engine.metadata import LoadJob, MoveJob
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.scheduler.arena_events import ArenaEvents
from lmkv_ray.vllm.scheduler.far_places import FarPlaces
from lmkv_ray.vllm.scheduler.misses import MissCounter
from lmkv_ray.vllm.scheduler.own_cache import device_prefix
from lmkv_ray.vllm.scheduler.pace import Pace
from lmkv_ray.vllm.scheduler.places import Place
from lmkv_ray.vllm.scheduler.requests import Claim, FoundChunks, TrackedRequest

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

    from lmkv_ray.vllm.link.shard_link import ShardLink

logger = logging.getLogger(__name__)

NOTHING_TO_LOAD: tuple[int | None, bool] = (0, False)
"""``match``'s answer for a miss."""


class _Look(NamedTuple):
    """What the mapped arena has for a request."""

    computed: int
    limit: int
    """Tokens of the longest hit there could be."""
    end: int
    """Tokens of the longest hit there is."""
    found: list[FoundChunks]
    """Of each group: its chunks from ``computed`` to ``limit``."""


class Loader:
    """Finds hits and orders their loads.

    Args:
        settings: of this engine.
        groups: the engine's KV groups, in its order.
        places: of the engine; chunks are looked up in the first, and asked of the others.
        stats: where to count.
        dropped: whether this engine lately failed to save a key.
        pace: how fast this engine computes.
        events: is told of chunks in the arena; None: nothing is.
    """

    def __init__(
        self,
        settings: Settings,
        groups: Sequence[Group],
        places: Sequence[Place],
        stats: LmkvStats,
        dropped: Callable[[bytes], bool],
        pace: Pace,
        events: ArenaEvents | None,
    ) -> None:
        self._settings = settings
        self._groups = groups
        self._places = places
        self._links = places[0].links
        self._link = places[0].link
        self._far = FarPlaces(settings, groups, places[1:], self._remaining)
        self._misses = MissCounter(groups, places, stats, dropped)
        self._pace = pace
        self._events = events
        self._align = hit_alignment(groups)
        self._orders: list[LoadJob] = []
        self._moves: list[MoveJob] = []

    def prefetch(self, tracked: TrackedRequest, pool: BlockPool | None) -> None:
        """Begin to stage what a new request needs and neither the arena nor the device has."""
        if not tracked.known:
            return
        reader, limit = self._link.readable, self._limit(tracked)
        if reader is None or not (self._link.peers or self._far) or limit <= 0:
            return
        hashes = tracked.request.block_hashes
        computed = device_prefix(pool, self._groups, hashes, limit=limit, align=self._align)
        if computed < limit:
            look = self._look(tracked, reader, computed, limit)
            self._stage(tracked, look)
            if self._far and (look.end > computed or tracked.tickets):
                self._far.ask(tracked, computed, limit)

    def exact(self, tracked: TrackedRequest, pool: BlockPool | None) -> int:
        """Tokens of a request that the device or the arena has as a prefix, as far as is known."""
        reader, limit = self._link.readable, self._limit(tracked)
        if reader is None or limit <= 0:
            return 0
        hashes = tracked.request.block_hashes
        computed = device_prefix(pool, self._groups, hashes, limit=limit, align=self._align)
        return self._look(tracked, reader, computed, limit).end if computed < limit else computed

    def match(self, tracked: TrackedRequest, computed: int) -> tuple[int | None, bool]:
        """How many tokens after ``computed`` can be loaded, as vLLM asks it.

        Returns:
            (tokens, True) to load asynchronously, (0, False) for nothing, (None, False) to be
            asked again: chunks, or answers, may still arrive from elsewhere.
        """
        tracked.claim = Claim(computed, computed)
        if not tracked.known:
            return NOTHING_TO_LOAD
        reader, limit = self._link.readable, self._limit(tracked)
        if reader is None or limit <= computed or not self._far.usable:
            return NOTHING_TO_LOAD
        look = self._look(tracked, reader, computed, limit)
        if look.end < limit and self._waits(tracked, look):
            return None, False
        if look.end <= computed:
            return NOTHING_TO_LOAD
        far = self._far.look(tracked, computed, limit)
        if far is None:
            return None, False
        found = [*look.found, *far]
        end = self._longest(found, computed, limit) if far else look.end
        if end <= computed:
            return NOTHING_TO_LOAD
        needed = [chunks.part(chunks.group.span(computed, end)) for chunks in found]
        tracked.claim = Claim(computed, end, needed)
        return end - computed, True

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
        self._misses.count(tracked, tokens)
        if tokens <= 0:
            return
        # vLLM now waits for a load to end, whatever happens here: there must be one.
        try:
            if claim is None or claim.tokens != tokens:
                raise ValueError(f"{tokens} tokens are to be loaded, {claim} was answered")
            orders = [_order(tracked, claim, found, tables) for found in claim.found]
            moves = [_move(tracked, claim.plan, tables, self._link)] if claim.plan else []
        except Exception:
            logger.exception("lmkv_ray: a load was not ordered; its tokens are recomputed")
            begin, size = claim.computed if claim else 0, self._groups[0].block_tokens
            blocks = tables[0][begin // size : -(-(begin + tokens) // size)]
            self._orders.append(LoadJob.lost(request.request_id, list(blocks)))
            return
        self._orders += orders
        self._moves += moves
        if tracked.composed is not None and claim.plan is not None:
            tracked.composed.loading = True
        self._ordered(tracked, claim)

    def take_orders(self) -> list[LoadJob]:
        """Loads to begin in this step."""
        orders, self._orders = self._orders, []
        return orders

    def take_moves(self) -> list[MoveJob]:
        """Text to be copied to other positions, to begin in this step."""
        moves, self._moves = self._moves, []
        return moves

    @never_raises(None)
    def _ordered(self, tracked: TrackedRequest, claim: Claim) -> None:
        """What is being loaded was used, and need not be saved."""
        for group in self._groups:
            span, end = group.span(0, claim.end), -(-claim.end // group.tokens)
            if self._events is not None and group.number in self._links:
                self._events.stored(tracked, group, span)
            for place in self._places:
                if group.number not in place.links:
                    continue
                saved = tracked.saved[place.number]
                saved[group.number] = max(saved[group.number], end)
                keys = key_list(tracked.keys(group, place.number)[span.start : end])
                place.links[group.number].slots.touch(keys[::-1])

    # -- what is there --------------------------------------------------------------------------

    def _limit(self, tracked: TrackedRequest) -> int:
        """Tokens that a hit can have at most.

        Like vLLM's own prefix cache, leave the last token's block to be computed: so a hit is the
        same computation, to the bit, whichever cache served it. And like it, have none for a
        request that wants something of every token (log probabilities of its prompt, pooling).
        """
        request = tracked.request
        if request.skip_reading_prefix_cache:  # which vLLM checks itself since 0.31 only
            return 0
        limits = [len(tracked.keys(group)) * group.tokens for group in self._groups]
        limits.append(request.num_tokens - 1)
        if tracked.never_past is not None:
            limits.append(tracked.never_past)
        return min(limits) // self._align * self._align

    def _look(
        self, tracked: TrackedRequest, reader: ArenaReader, computed: int, limit: int
    ) -> _Look:
        found = []
        for number in self._links:
            group = self._groups[number]
            first = computed // group.tokens
            keys = tracked.keys(group)[first : -(-limit // group.tokens)]
            hits = reader.lookup(keys).of_size(self._places[0].nbytes[number])
            found.append(
                FoundChunks(0, reader.arena_id, group, first, hits.slots, hits.generations)
            )
        return _Look(computed, limit, self._longest(found, computed, limit), found)

    def _longest(self, found: Sequence[FoundChunks], computed: int, limit: int) -> int:
        """Tokens of the longest hit that all places have, each of them all groups."""
        everywhere: list[Bools] = [
            np.ones(-(-limit // group.tokens) - computed // group.tokens, np.bool_)
            for group in self._groups
        ]
        for chunks in found:
            everywhere[chunks.group.number] &= chunks.found
        return longest_hit(
            self._groups,
            everywhere,
            computed=computed,
            limit=limit,
            align=self._align,
        )

    # -- what may come from elsewhere -----------------------------------------------------------

    def _waits(self, tracked: TrackedRequest, look: _Look) -> bool:
        if not tracked.tickets:
            self._stage(tracked, look)
        return any(ticket.pending for ticket in tracked.tickets)

    def _stage(self, tracked: TrackedRequest, look: _Look) -> None:
        """Ask for what a hit of ``look.limit`` tokens lacks."""
        within = self._settings.stage_seconds
        missing = look.limit - look.end
        if not (within and self._link.peers and missing >= max(1, self._settings.stage_min_tokens)):
            return
        for chunks in look.found:
            group, link = chunks.group, self._links[chunks.group.number]
            span = group.span(look.computed, look.limit)
            found = chunks.found[span.start - chunks.first :]
            if found.all():
                continue
            first = span.start + int(np.argmin(found))
            keys = tracked.keys(group)[first : span.stop]
            remaining = self._remaining(tracked, group, first, len(keys))
            if ticket := link.stage(keys.tobytes(), within, remaining, space=tracked.space()):
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


def _move(
    tracked: TrackedRequest, plan: Plan, tables: Sequence[Sequence[int]], link: ShardLink
) -> MoveJob:
    if link.attachment is None:
        raise ValueError("the arena is gone")
    blocks = list(tables[0])
    return MoveJob(
        tracked.request.request_id, link.attachment.arena_id, plan.exact, plan.pieces, blocks
    )


def _order(
    tracked: TrackedRequest, claim: Claim, found: FoundChunks, tables: Sequence[Sequence[int]]
) -> LoadJob:
    group = found.group
    first, end = group.first_block(claim.computed, claim.end), claim.end // group.block_tokens
    blocks = list(tables[group.number][first:end])
    if len(blocks) != max(0, end - first):
        raise ValueError(f"group {group.number} has too few blocks for {claim.end} tokens")
    return LoadJob(
        request_id=tracked.request.request_id,
        arena_id=found.arena_id,
        group=group.number,
        first_chunk=found.first,
        slots=found.slots.tolist(),
        generations=found.generations.tolist(),
        skip=max(0, first - found.first * group.blocks),
        blocks=blocks,
        place=found.place,
        adapter=tracked.adapter_id,
    )
