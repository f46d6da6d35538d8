"""A few threads for what blocks, and what they are at."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from lmkv_ray.clock import Clock

T = TypeVar("T")


class Job(Generic[T]):
    """A function that waits for a thread, runs, or has ended. It never raises.

    Attributes:
        ended: done when no thread will touch what the function works on any more.
    """

    def __init__(self, pool: ThreadPoolExecutor, clock: Clock, function: Callable[[], T]) -> None:
        self._clock = clock
        self._function = function
        self._begun: float | None = None
        self._thread: Future[T | Exception] = pool.submit(self._run)
        self.ended: asyncio.Future[T | Exception] = asyncio.wrap_future(self._thread)

    @property
    def result(self) -> T | Exception | None:
        """Of an ended job: what it returned or raised; None if it was cancelled before it began."""
        return None if self.ended.cancelled() else self.ended.result()

    def cancel(self) -> None:
        """Do not begin, if it has not."""
        self._thread.cancel()

    def seconds(self) -> float:
        """For how long it has been running; 0 if it has not begun."""
        return self._clock.monotonic() - self._begun if self._begun is not None else 0.0

    def _run(self) -> T | Exception:
        self._begun = self._clock.monotonic()
        try:
            return self._function()
        except Exception as error:
            return error


class Workers:
    """Runs functions in at most ``threads`` threads. Use it on one event loop."""

    def __init__(self, name: str, threads: int, clock: Clock) -> None:
        self._clock = clock
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"lmkv-{name}")
        self._jobs: set[asyncio.Future[object]] = set()

    def start(self, function: Callable[[], T]) -> Job[T]:
        """Queue a function. The caller bounds how many there are."""
        job = Job(self._pool, self._clock, function)
        self._jobs.add(job.ended)  # type: ignore[arg-type]
        job.ended.add_done_callback(self._jobs.discard)
        return job

    async def run(self, function: Callable[[], T]) -> T | Exception | None:
        """As ``Job.result``. When cancelled, the function goes on."""
        job = self.start(function)
        await asyncio.wait([job.ended])
        return job.result

    async def idle(self, within: float | None = None) -> bool:
        """Wait until nothing runs; False if that takes longer than ``within`` seconds."""
        if self._jobs:
            await asyncio.wait(set(self._jobs), timeout=within)
        return not self._jobs

    def close(self) -> None:
        """Begin nothing more, and end the threads as soon as they are free."""
        self._pool.shutdown(wait=False, cancel_futures=True)
