"""Waiting for work that must not go on after its caller has left: it writes into slots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def to_the_end(function: Callable[[], T], executor: Executor | None = None) -> T:
    """Run in a thread, and do not leave before it has ended, even when cancelled.

    A fetch writes into slots, and its caller gives them away after a cancellation.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, function)
    await all_ended([future])
    return future.result()


async def all_ended(futures: Iterable[asyncio.Future[T]]) -> None:
    """Wait until all have ended, also when cancelled meanwhile (that is passed on afterwards)."""
    awaited = list(futures)
    running = [future for future in awaited if not future.done()]
    cancelled = False
    while running:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError:
            cancelled = True
        running = [future for future in running if not future.done()]
    if cancelled:
        for future in awaited:
            if not future.cancelled():
                future.exception()  # no caller is left to ask for it, which asyncio would log
        raise asyncio.CancelledError
