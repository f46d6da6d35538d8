"""Rows: holes of a request are computed in the step in which it begins, as more rows of the batch.

``--scheduler-cls lmkv_ray.vllm.scheduler.rows.scheduler``. To vLLM's workers a row is one more new
request: the same prompt, the same blocks, computed up to the hole's begin, with the hole's tokens
scheduled. In each layer all rows write their keys and values before any row attends, so a row sees
what those before it computed in the same step. Rows are finished with the next step; nothing is
sampled from them, since their prompt goes on behind the hole. vLLM's scheduler does not know them:
where it takes in what workers made, it skips what it does not know.

Rows go only with the step that begins their request, which is held back while there is no room.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from lmkv_ray.vllm.scheduler.composer import Composed, Composer, ready

logger = logging.getLogger(__name__)

CLASS = f"{__name__}.scheduler"
"""For ``--scheduler-cls``."""

HOLD_STEPS = 300
"""Steps that a request may wait for room for its rows; then it is computed without them."""

ATTRIBUTES = (
    "running",
    "requests",
    "num_waiting_for_streaming_input",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "finished_recving_kv_req_ids",
    "failed_recving_kv_req_ids",
    "finished_req_ids",
    "kv_cache_manager",
)
"""Of vLLM's scheduler."""
OUTPUT = ("scheduled_new_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens")
NEW_REQUEST = ("req_id", "sampling_params", "num_computed_tokens", "block_ids")


def scheduler(*args: Any, **kwargs: Any) -> Any:
    """VLLM's own scheduler, with rows; it is called as the class is."""
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    if config.scheduler_config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Base
    else:
        from vllm.v1.core.sched.scheduler import Scheduler as Base
    return with_rows(Base)(*args, **kwargs)


def with_rows(base: type[Any]) -> type[Any]:
    """A subclass of vLLM's scheduler that computes holes."""

    class Rows(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._connector = _ours(self.connector)
            if missing := missing_names(self):
                logger.warning(
                    "lmkv_ray: this vLLM's scheduler has no %s: text is reused as a prefix only. "
                    "Next step: use vLLM 0.29 to 0.33.",
                    ", ".join(missing),
                )
            elif self._connector is not None:
                self._connector.rows = True

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            composer: Composer | None = getattr(self._connector, "composer", None)
            if composer is None or not composer.loading:
                return super().schedule(*args, **kwargs)
            with _room(self, composer):
                output = super().schedule(*args, **kwargs)
            for entry, data in _begun(composer, output):
                composer.begun(entry)
                _append(self, output, entry, data)
            return output

    return Rows


def missing_names(scheduler: Any) -> list[str]:
    """What rows need of vLLM and the installed one does not have."""
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    missing = [name for name in ATTRIBUTES if not hasattr(scheduler, name)]
    for owner, needed in ((SchedulerOutput, OUTPUT), (NewRequestData, NEW_REQUEST)):
        there = {field.name for field in fields(owner)}
        missing += [f"{owner.__name__}.{name}" for name in needed if name not in there]
    return missing


def _ours(connector: Any) -> Any:
    """Our connector, if it is one of several too."""
    for entry in (connector, *getattr(connector, "_connectors", ())):
        if hasattr(type(entry), "composer"):
            return entry
    return None


@contextmanager
def _room(scheduler: Any, composer: Composer) -> Iterator[None]:
    """For one call of ``schedule``: keep room for the rows of what may begin in it, hide the rest.

    Hiding must not outlast the call: of a request that is aborted in between, vLLM would wait for a
    load that has ended long ago.
    """
    limits = {
        name: getattr(scheduler, name)
        for name in ("max_num_running_reqs", "max_num_active_reqs", "max_num_scheduled_tokens")
        if hasattr(scheduler, name)
    }
    finished, failed = scheduler.finished_recving_kv_req_ids, scheduler.failed_recving_kv_req_ids
    seats = limits["max_num_running_reqs"] - len(scheduler.running)
    seats -= scheduler.num_waiting_for_streaming_input
    half = limits["max_num_scheduled_tokens"] // 2
    rows = tokens = 0
    hidden: list[Composed] = []
    flipped: list[Composed] = []
    for entry in list(ready(composer, finished, failed)):
        assert entry.plan is not None
        more, its_tokens = len(entry.plan.holes), entry.plan.recomputed
        if more + 1 <= seats and tokens + its_tokens <= half:
            seats, rows, tokens = seats - more - 1, rows + more, tokens + its_tokens
        elif entry.held >= HOLD_STEPS:
            _give_up(scheduler, composer, entry)
        else:
            entry.held += 1
            hidden.append(entry)
    for entry in hidden:
        if entry.request_id in finished:
            finished.discard(entry.request_id)
        else:
            entry.request.status = type(entry.request.status).WAITING_FOR_REMOTE_KVS
            flipped.append(entry)
    for name in limits.keys() - {"max_num_scheduled_tokens"}:
        lowered = min(limits[name], limits["max_num_running_reqs"] - rows)
        setattr(scheduler, name, lowered)
    scheduler.max_num_scheduled_tokens -= tokens
    try:
        yield
    finally:
        for name, value in limits.items():
            setattr(scheduler, name, value)
        for entry in hidden:
            if entry in flipped:
                entry.request.status = type(entry.request.status).WAITING
            else:
                scheduler.finished_recving_kv_req_ids.add(entry.request_id)


def _give_up(scheduler: Any, composer: Composer, entry: Composed) -> None:
    """As if its whole load had failed: vLLM frees its blocks and asks again."""
    tables = scheduler.kv_cache_manager.get_block_ids(entry.request_id)
    scheduler.kv_cache_manager.evict_blocks(set(composer.unfilled(entry, tables)))
    composer.drop(entry, 0)
    composer.given_up()
    entry.request.num_computed_tokens = 0
    entry.request.status = type(entry.request.status).WAITING_FOR_REMOTE_KVS
    scheduler.failed_recving_kv_req_ids.add(entry.request_id)
    scheduler.finished_recving_kv_req_ids.add(entry.request_id)


def _begun(composer: Composer, output: Any) -> list[tuple[Composed, Any]]:
    """Of the requests that this step begins, those that are put together."""
    loading = {entry.request_id: entry for entry in composer.loading}
    return [(loading[d.req_id], d) for d in output.scheduled_new_reqs if d.req_id in loading]


def _append(scheduler: Any, output: Any, entry: Composed, data: Any) -> None:
    """The rows of a request to the step that begins it."""
    from vllm import SamplingParams

    plan = entry.plan
    if plan is None or data.num_computed_tokens != plan.resume:
        return  # it begins elsewhere, for instance since a load failed
    for number, (begin, end) in enumerate(plan.holes):
        row = f"{entry.request_id}-lmkv-row-{number}"
        output.scheduled_new_reqs.append(
            replace(
                data,
                req_id=row,
                sampling_params=SamplingParams(temperature=0, max_tokens=1),
                num_computed_tokens=begin,
                block_ids=tuple(list(blocks) for blocks in data.block_ids),
            )
        )
        output.num_scheduled_tokens[row] = end - begin
        output.total_num_scheduled_tokens += end - begin
        scheduler.finished_req_ids.add(row)
