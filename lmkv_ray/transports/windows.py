"""Carrying out a fetch in windows of chunks, a few of them at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from lmkv_ray.fetch import Failure, Outcome, failed
from lmkv_ray.waits import all_ended

Bring = Callable[[range], Coroutine[Any, Any, list[Outcome]]]
"""Brings the chunks of a window. When it has returned, or ended after it was cancelled, nothing
writes into their destinations any more. It raises nothing, and returns by the deadline."""

ENDS = (Failure.LOST, Failure.LATE)
"""Failures of a whole window after which no other window is worth a try."""


async def in_windows(
    windows: Sequence[range], bring: Bring, in_flight: int
) -> AsyncGenerator[Outcome, None]:
    """Outcomes of all windows, in their order.

    A window that the peer or the deadline failed as a whole ends the fetch: what else would be
    asked for would fail alike.
    """
    waiting = deque(windows)
    under_way: deque[tuple[range, asyncio.Task[list[Outcome]]]] = deque()
    try:
        while waiting or under_way:
            while waiting and len(under_way) < in_flight:
                window = waiting.popleft()
                under_way.append((window, asyncio.create_task(bring(window))))
            # No name may keep an answer, or what it holds in the object store stays pinned.
            outcomes = await under_way[0][1]
            under_way.popleft()
            for outcome in outcomes:
                yield outcome
            failure = outcomes[0]
            reason = failure.failure
            if reason in ENDS and all(outcome.failure is reason for outcome in outcomes):
                break
        else:
            return
        tasks = [task for _, task in under_way]
        for task in tasks:
            task.cancel()
        await all_ended(tasks)
        left = [
            failed(window, reason, failure.detail) if task.cancelled() else task.result()
            for window, task in under_way
        ]
        left += [failed(window, reason, failure.detail) for window in waiting]
        for outcomes in left:
            for outcome in outcomes:
                yield outcome
    finally:
        tasks = [task for _, task in under_way]
        for task in tasks:
            task.cancel()
        await all_ended(tasks)
