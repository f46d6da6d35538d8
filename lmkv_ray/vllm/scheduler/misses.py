"""Counts a request's hit, and a reason for every token that was not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaReader
from lmkv_ray.keys import key_list
from lmkv_ray.messages import MissReason
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.guard import never_raises
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.link.ticket import StageTicket
from lmkv_ray.vllm.scheduler.places import Place
from lmkv_ray.vllm.scheduler.requests import TrackedRequest


class MissCounter:
    """See the module.

    Args:
        groups: the engine's KV groups, in its order.
        places: the engine's nodes, its own first.
        stats: where to count.
        dropped: whether this engine lately failed to save a key.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        places: Sequence[Place],
        stats: LmkvStats,
        dropped: Callable[[bytes], bool],
    ) -> None:
        self._groups = groups
        self._places = places
        self._stats = stats
        self._dropped = dropped

    @never_raises(None)
    def count(self, tracked: TrackedRequest, tokens: int) -> None:
        """Count a new request, of which ``tokens`` of its claim are loaded."""
        claim = tracked.claim
        if tracked.counted or claim is None:
            return
        tracked.counted = True
        if claim.plan is not None:
            tokens = claim.end - claim.computed
        if tokens:
            self._stats.add("hit_tokens", tokens)
        size = self._groups[0].tokens
        prompt = tracked.request.num_prompt_tokens
        if tracked.composed is not None and tracked.composed.exact is not None:
            reused = claim.plan.reused if claim.plan is not None else 0
            missed = prompt - claim.computed - tokens - reused
            self._stats.add_missed(MissReason.COMPOSED, missed)
            return
        begin, chunks = (claim.computed + tokens) // size, prompt // size
        tail = prompt - max(chunks * size, claim.computed + tokens)
        if tail > 0:
            self._stats.add_missed(MissReason.TAIL, tail)
        if begin >= chunks:
            return
        if tracked.request.skip_reading_prefix_cache:
            self._stats.add_missed(MissReason.NOT_READ, (chunks - begin) * size)
            return
        if not tracked.known:
            self._stats.add_missed(MissReason.IDENTITY_PENDING, (chunks - begin) * size)
            return
        reader = self._places[0].link.readable
        if reader is None or any(place.link.attachment is None for place in self._places):
            self._stats.add_missed(MissReason.DETACHED, (chunks - begin) * size)
            return
        far = tracked.asked.tickets.values() if tracked.asked is not None else ()
        staged = _why_not_staged([*tracked.tickets, *(ticket for ticket in far if ticket)])
        keys = key_list(tracked.keys(self._groups[0])[begin:chunks])
        ends = np.arange(begin + 1, chunks + 1) * size
        for key, reason in zip(keys, self._reasons(tracked, reader, ends), strict=True):
            own = MissReason.SAVE_DROPPED if self._dropped(key) else None
            self._stats.add_missed(own or staged or reason, size)

    def _reasons(
        self, tracked: TrackedRequest, reader: ArenaReader, ends: npt.NDArray[np.int64]
    ) -> list[MissReason]:
        """Why the chunks that hold these tokens' ends are missing: the first group that knows."""
        never = MissReason.NEVER_STORED
        reasons = [never] * len(ends)
        for group in self._groups:
            keys = tracked.keys(group)
            if len(keys):
                of_group = reader.reasons(keys[np.minimum(-(-ends // group.tokens), len(keys)) - 1])
                known = zip(reasons, of_group, strict=True)
                reasons = [b if a is never else a for a, b in known]
        if self._places[0].link.differs:
            return [MissReason.OTHER_NAMESPACE if reason is never else reason for reason in reasons]
        return reasons


def _why_not_staged(tickets: Iterable[StageTicket]) -> MissReason | None:
    for ticket in tickets:
        if not ticket.over or ticket.reply is None:
            return MissReason.STAGE_TIMEOUT
        if ticket.reply.reason not in (None, MissReason.NEVER_STORED):
            return ticket.reply.reason
    return None
