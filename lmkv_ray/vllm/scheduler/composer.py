"""Requests that are put together from stored text: their plans, from arrival until they begin.

Runs on the engine's thread. What decides is the request's state and vLLM's own; the scheduler class
of ``rows`` computes the holes in the step in which a request begins.

A block of such a request has a name of ours from before the first lookup in vLLM's prefix cache
until the plan is dropped (``names``). Between the end of its load and the step that begins it, its
blocks are in that cache though their holes are empty: ``unfinished`` says which these are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lmkv_ray.anywhere.names import first_named, names
from lmkv_ray.anywhere.plan import Plan, PlanLimits

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True, eq=False)
class Composed:
    """One request that is, or was to be, put together."""

    request: Request
    whole: Plan
    """What its blocks are named after."""
    exact: int | None
    """Tokens of blocks with exact names; None: all have, for the plan was dropped."""
    plan: Plan | None = None
    """What was answered last: ``whole`` without what the device, or the arena, has in front."""
    loading: bool = False
    """vLLM has given it blocks; not begun yet."""
    over: bool = False
    """The plan was dropped, and is not made again."""
    held: int = 0
    """Steps in which there was no room for its rows."""
    names: frozenset[bytes] = field(default=frozenset())

    @property
    def request_id(self) -> str:
        """Of vLLM's request."""
        return str(self.request.request_id)


class Composer:
    """Knows all requests that are put together.

    Args:
        block: tokens between two of vLLM's block hashes.
        limits: of one step.
        given_up: called for each request that no step has had room for.
    """

    def __init__(
        self, block: int, limits: PlanLimits, given_up: Callable[[], None] = lambda: None
    ) -> None:
        self.limits = limits
        self.given_up = given_up
        self._block = block
        self._composed: dict[str, Composed] = {}

    @property
    def loading(self) -> list[Composed]:
        """Those that have blocks and have not begun."""
        return [entry for entry in self._composed.values() if entry.loading]

    def compose(self, request: Request, plan: Plan) -> Composed:
        """A new request is to be put together: rename its blocks."""
        entry = Composed(request, plan, first_named(plan, self._block) * self._block)
        self._rename(entry)
        self._composed[entry.request_id] = entry
        return entry

    def claim(self, entry: Composed, computed: int, exact: int) -> Plan | None:
        """What of its plan is still to be done.

        Args:
            entry: a composed request that is not loading yet.
            computed: tokens that the device has, under its present names.
            exact: tokens that it or the arena has; at least ``computed``.

        Returns:
            None: nothing; the request goes on as an ordinary one.
        """
        plan = None
        if not (entry.over or entry.request.num_preemptions):
            plan = entry.whole.begin_at(max(computed, exact))
            plan = plan and plan.within(self.limits)
        if plan is None:
            self.drop(entry, computed)
            return None
        if plan.resume < entry.whole.resume:
            pieces = tuple(p for p in entry.whole.pieces if p.end <= plan.resume)
            entry.whole = replace(entry.whole, pieces=pieces)
            self._rename(entry)
        entry.plan = plan
        return plan

    def unfinished(self, request: Request, computed: int) -> bool:
        """Whether the last of a request's blocks on the device still has holes to be computed."""
        if computed < self._block:
            return False
        last = request.block_hashes[computed // self._block - 1]
        return any(
            last in entry.names and entry.request is not request
            for entry in self._composed.values()
            if entry.loading
        )

    def begun(self, entry: Composed) -> None:
        """The step that computes its holes was scheduled."""
        entry.loading = False

    def drop(self, entry: Composed, computed: int) -> None:
        """It goes on as an ordinary request from ``computed`` tokens on: restore later names."""
        entry.loading, entry.over = False, True
        if entry.exact is None:
            return
        first = entry.exact // self._block
        keep = max(first, computed // self._block)
        del entry.request.block_hashes[keep:]
        entry.request.update_block_hashes()  # of generated tokens too, if it was preempted
        if keep == first:
            entry.exact = None
            self._composed.pop(entry.request_id, None)

    def finished(self, entry: Composed, tables: Sequence[Sequence[int]]) -> Collection[int]:
        """It ended.

        Returns:
            blocks that must leave vLLM's prefix cache: they may have holes that nothing computes.
        """
        self._composed.pop(entry.request_id, None)
        return self.unfilled(entry, tables)

    def unfilled(self, entry: Composed, tables: Sequence[Sequence[int]]) -> Collection[int]:
        """Its blocks that may have holes."""
        if not entry.loading or entry.plan is None:
            return ()
        return set(tables[0][entry.plan.exact // self._block :])

    def _rename(self, entry: Composed) -> None:
        request, whole = entry.request, entry.whole
        first = first_named(whole, self._block)
        lora = request.lora_request
        tenant = (lora.lora_name if lora else "", str(request.cache_salt or ""))
        # An error must leave the request as it was: vLLM reads one hash for each whole block.
        made = names(whole, request.block_hashes, request.all_token_ids, self._block, tenant)
        request.block_hashes[first:] = made
        request.update_block_hashes()
        entry.names = frozenset(request.block_hashes[first:])


def ready(
    composer: Composer, finished: Collection[str], failed: Collection[str]
) -> Iterator[Composed]:
    """Requests that vLLM would begin in its next step.

    Args:
        composer: knows them.
        finished: ids of requests whose load has ended.
        failed: ids of those whose load failed.
    """
    for entry in composer.loading:
        request, plan = entry.request, entry.plan
        if plan is None or entry.request_id in failed:
            continue
        status = request.status.name
        if status == "WAITING_FOR_REMOTE_KVS":
            if entry.request_id in finished:
                yield entry
        elif status == "WAITING" and request.num_computed_tokens == plan.resume:
            yield entry
