"""Whether, and how, requests of this engine are put together from stored text.

Runs on the engine's thread; never waits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lmkv_ray.anywhere.matches import SegmentFinder
from lmkv_ray.anywhere.plan import MAX_ROWS, PlanLimits, plan
from lmkv_ray.anywhere.selection import best_match, within_spans
from lmkv_ray.config import Settings
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.guard import never_raises
from lmkv_ray.vllm.engine.metadata import LayoutReport
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.engine.support import why_not_anywhere
from lmkv_ray.vllm.scheduler.composer import Composer
from lmkv_ray.vllm.scheduler.requests import TrackedRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

SCHEDULER = "lmkv_ray.vllm.scheduler.rows.scheduler"
"""For vLLM's ``--scheduler-cls``."""


class Anywhere:
    """Makes plans for new requests, and says what is to be loaded for them.

    Args:
        settings: of this engine.
        group: the engine's only one.
        limits: what one step of the engine can compute.
        stats: where to count.
    """

    def __init__(
        self, settings: Settings, group: Group, limits: PlanLimits, stats: LmkvStats
    ) -> None:
        self.composer = Composer(group.hash_tokens, limits, lambda: stats.add("rows_given_up", 1))
        self.finder: SegmentFinder | None = None
        """Finds stored text in prompts; without it nothing is put together."""
        self._all = settings.anywhere == "all"
        self._group = group
        self._stats = stats

    def wants(self, tracked: TrackedRequest) -> bool:
        """Whether a new request may be put together."""
        request, wish = tracked.request, tracked.wishes.anywhere
        refused = (
            self.finder is None
            or not (self._all if wish is None else wish.on)
            or request.num_preemptions
            or request.pooling_params is not None
            or request.prompt_token_ids is None
            or request.prompt_embeds is not None
            or request.mm_features
            or request.lora_request is not None
            or request.skip_reading_prefix_cache
            or request.resumable
        )
        return not refused

    @never_raises(None)
    def compose(self, tracked: TrackedRequest, exact: int) -> None:
        """Put a new request together, if there is something to use.

        Args:
            tracked: nothing of it was looked up in vLLM's own cache yet.
            exact: tokens that the device or the arena has of it as a prefix.
        """
        request, wish = tracked.request, tracked.wishes.anywhere
        assert self.finder is not None
        tokens: Sequence[int] = request.prompt_token_ids or ()
        matches = list(
            self.finder.find(
                tokens, begin=exact, space=tracked.space(), adapter=tracked.adapter or b""
            )
        )
        if not matches:
            return
        numbers = list(range(len(matches)))
        if wish is not None and wish.spans:
            matches, numbers = within_spans(matches, wish.spans, self._group.tokens)
        whole = wish.whole if wish is not None else None
        if whole is None:
            whole = "best" if any(match.lone for match in matches) else ()
        if whole == "best":
            best = best_match(matches, tokens)
            again = set() if best is None else {best}
        else:
            again = {i for i, number in enumerate(numbers) if number in whole}
        made = plan(
            exact,
            matches,
            n=len(tokens),
            chunk_tokens=self._group.tokens,
            first=wish.first if wish is not None else 0,
            whole=again,
            limits=self.composer.limits,
        )
        if made is not None:
            tracked.composed = self.composer.compose(request, made)

    def claim(
        self, tracked: TrackedRequest, computed: int, answer: tuple[int | None, bool]
    ) -> tuple[int | None, bool]:
        """What vLLM is answered.

        Args:
            tracked: the request.
            computed: tokens that the device has.
            answer: what would be answered for its exact prefix alone.
        """
        if self.composer.unfinished(tracked.request, computed):
            return None, False
        composed, exact = tracked.composed, answer[0]
        if composed is None or exact is None or tracked.claim is None:
            return answer
        made = self.composer.claim(composed, computed, computed + exact)
        if made is None:
            return answer
        tracked.claim = replace(tracked.claim, plan=made)
        return made.resume - computed, True

    @never_raises(None)
    def admitted(self, tracked: TrackedRequest) -> None:
        """The loads of a request were ordered: tell what is computed of it."""
        claim, request = tracked.claim, tracked.request
        if claim is None or claim.plan is None:
            return
        self._stats.add("reused_tokens", claim.plan.reused)
        self._stats.add("recomputed_tokens", claim.plan.recomputed)
        told = request.prefill_stats
        if told is not None:
            told.set(
                num_prompt_tokens=request.num_prompt_tokens,
                num_local_cached_tokens=claim.computed,
                num_external_cached_tokens=claim.tokens - claim.plan.recomputed,
            )

    @never_raises(None)
    def failed(self, tracked: TrackedRequest) -> None:
        """A load of a request failed: it goes on as an ordinary one."""
        if tracked.composed is not None and tracked.claim is not None:
            self.composer.drop(tracked.composed, tracked.claim.computed)

    def finished(self, tracked: TrackedRequest, tables: Sequence[Sequence[int]]) -> set[int]:
        """Blocks of a request that ended which vLLM's prefix cache must forget."""
        if tracked.composed is None:
            return set()
        return set(self.composer.finished(tracked.composed, tables))


def open_anywhere(
    config: VllmConfig,
    settings: Settings,
    groups: Sequence[Group],
    reports: Sequence[LayoutReport],
    stats: LmkvStats,
    *,
    rows: bool,
) -> Anywhere | None:
    """For an engine that reuses text anywhere; else None, and one line in the log that says why.

    Args:
        config: vLLM's.
        settings: of this engine.
        groups: the engine's KV groups, in its order.
        reports: of all workers.
        stats: where to count.
        rows: vLLM's scheduler is ours (see ``rows``).
    """
    if settings.anywhere == "off":
        return None
    hosts = {report.host for report in reports}
    refusals = [why_not_anywhere(config, groups), *(report.no_moves for report in reports)]
    if len(hosts) > 1:
        refusals.append("workers of one engine on several nodes are not supported with it")
    if not rows:
        refusals.append(f"vLLM was started without --scheduler-cls {SCHEDULER}")
    if why := next(filter(None, refusals), None):
        logger.warning(
            "lmkv_ray: anywhere is %s, but text is reused as a prefix only: %s.",
            settings.anywhere,
            why,
        )
        return None
    scheduler = config.scheduler_config
    rows_at_once = min(MAX_ROWS, scheduler.max_num_seqs - 1)
    limits = PlanLimits(rows=rows_at_once, tokens=scheduler.max_num_batched_tokens // 2)
    logger.warning(
        "lmkv_ray: anywhere is %s and this engine is ready for it, but this version has nothing "
        "that finds stored text: text is reused as a prefix only, until a program hands in a "
        "finder (docs/anywhere.md).",
        settings.anywhere,
    )
    return Anywhere(settings, groups[0], limits, stats)
