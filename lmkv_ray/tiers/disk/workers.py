"""Functions that run in a few threads, and what is known of them meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from lmkv_ray.clock import Clock
from lmkv_ray.tiers.disk.medium import Threads

T = TypeVar("T")


class WorkerJob(Generic[T]):
    """A function that waits for a thread, runs, or has ended. It never raises.

    Attributes:
        ended: done when no thread will touch what the function works on any more.
        result: of an ended job: what it returned or raised; None if it never began.
    """

    def __init__(self, function: Callable[[], T], clock: Clock) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.result: T | Exception | None = None
        self._function = function
        self._clock = clock
        self._claim = threading.Lock()
        """Taken by the thread that begins it, or by ``cancel``."""
        self._begun: float | None = None

    def cancel(self) -> None:
        """Do not begin, if it has not."""
        if self._claim.acquire(blocking=False):
            self.end()

    def seconds(self) -> float:
        """For how long it has been running; 0 if it has not begun."""
        return self._clock.monotonic() - self._begun if self._begun is not None else 0.0

    def begin(self) -> bool:
        """See ``medium.Job``."""
        if not self._claim.acquire(blocking=False):
            return False
        self._begun = self._clock.monotonic()
        return True

    def work(self) -> None:
        """See ``medium.Job``."""
        try:
            self.result = self._function()
        except Exception as error:
            self.result = error

    def end(self) -> None:
        """See ``medium.Job``."""
        if not self.ended.done():
            self.ended.set_result(None)


class Workers:
    """Runs functions in threads. Use it on one event loop.

    Args:
        threads: run the functions.
        count: how many threads there are.
        clock: the machine's time and chance.
    """

    def __init__(self, threads: Threads, count: int, clock: Clock) -> None:
        self.count = count
        self._threads = threads
        self._clock = clock
        self.closed = False
        """What has not begun is not wanted any more."""
        self._jobs: set[asyncio.Future[None]] = set()

    def start(self, function: Callable[[], T]) -> WorkerJob[T]:
        """Queue a function. The caller bounds how many there are."""
        job = WorkerJob(function, self._clock)
        self._jobs.add(job.ended)
        job.ended.add_done_callback(self._jobs.discard)
        if self.closed:
            job.cancel()
        else:
            self._threads.start(job)
        return job

    async def run(self, function: Callable[[], T]) -> T | Exception | None:
        """As ``WorkerJob.result``. When cancelled, the function goes on."""
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
        self.closed = True
        self._threads.close()
