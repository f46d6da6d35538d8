"""One fetch: chunks from files into slots, several at once, in time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial

from lmkv_ray.clock import Clock
from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.keys import key_list
from lmkv_ray.tiers.disk.health import DiskHealth
from lmkv_ray.tiers.disk.index import Entry
from lmkv_ray.tiers.disk.mount import Mount
from lmkv_ray.tiers.disk.workers import WorkerJob, Workers
from lmkv_ray.waits import all_ended

SLOW_SECONDS = 2.0
"""A read that takes longer and misses its deadline puts the disk out of use for a while."""


class DiskReads:
    """The reads of one fetch.

    Args:
        fetch: what is wanted.
        mount: has the chunks, as long as it is in use.
        health: of the disk: while it cannot be read no read is begun.
        workers: the threads that read; twice as many reads of one fetch are queued.
        failed: told what the medium said; and which entry could not be read at all.
        clock: of the machine: the fetch has a deadline.
    """

    def __init__(
        self,
        fetch: Fetch,
        mount: Mount,
        health: DiskHealth,
        workers: Workers,
        failed: Callable[[Exception, Entry | None], None],
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._fetch = fetch
        self._keys = key_list(fetch.keys)
        self._workers = workers
        self._mount = mount
        self._health = health
        self._failed = failed
        self._deadline = self._clock.monotonic() + fetch.within
        self._given_up = threading.Event()
        self._running: dict[asyncio.Future[None], _Read] = {}
        self._arrived: list[int] = []

    async def outcomes(self) -> AsyncGenerator[Outcome, None]:
        """One for each key. Ends, and may be closed, only when no thread writes any more."""
        following = iter(range(len(self._keys)))
        more = True
        try:
            while more or self._running:
                left = self._deadline - self._clock.monotonic()
                if left <= 0:
                    break
                while more and len(self._running) < 2 * self._workers.count:
                    position = next(following, None)
                    more = position is not None
                    if position is not None and (refusal := self._start(position)):
                        yield refusal
                if self._running:
                    await asyncio.wait(
                        self._running, timeout=left, return_when=asyncio.FIRST_COMPLETED
                    )
                for outcome in self._finished():
                    yield outcome
            # Too late for what has not begun. What the kernel is at can not be called back: its
            # slot is not given away before it is done, and if all of it came it is not thrown away.
            for position in following:
                yield Outcome(position, failure=Failure.LATE)
            self._give_up()
            while self._running:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                for outcome in self._finished():
                    yield outcome
        finally:
            self._give_up()
            try:
                await all_ended(self._running)
            finally:
                for _ in self._finished():
                    pass
                self._touch()

    def _start(self, position: int) -> Outcome | None:
        """Queue a read, or say why not."""
        mount = self._mount
        usable = mount.in_use and self._health.readable
        entry = mount.index.get(self._keys[position]) if usable else None
        if entry is None:
            return Outcome(position, failure=Failure.MISSING)
        destination = self._fetch.destinations[position]
        if entry.label.nbytes > len(destination):
            return Outcome(position, failure=Failure.TOO_LARGE)
        mount.index.begin_read(entry)
        read = partial(mount.files.read, entry.label, destination, self._wanted)
        job = self._workers.start(read)
        self._running[job.ended] = _Read(position, entry, job)
        return None

    def _finished(self) -> list[Outcome]:
        """Outcomes of the reads that have ended."""
        ended = [future for future in self._running if future.done()]
        return [self._finish(self._running.pop(future)) for future in ended]

    def _finish(self, read: _Read) -> Outcome:
        index, entry = self._mount.index, read.entry
        result = read.job.result
        index.end_read(entry)
        if isinstance(result, Exception):
            self._failed(result, entry)
            detail = f"{type(result).__name__}: {result}"
            return Outcome(read.position, failure=Failure.LOST, detail=detail)
        if result is None or result is Failure.LATE:
            return Outcome(read.position, failure=Failure.LATE)
        if isinstance(result, Failure):  # the file is gone by now
            index.erased(entry)
            return Outcome(read.position, failure=result)
        self._arrived.append(read.position)
        return Outcome(read.position, entry.label.nbytes, result)

    def _give_up(self) -> None:
        self._given_up.set()
        for read in self._running.values():
            read.job.cancel()
            if read.job.seconds() > SLOW_SECONDS:
                why = f"a read took longer than {read.job.seconds():.1f} s"
                self._failed(TimeoutError(why), None)

    def _wanted(self) -> bool:
        return not self._given_up.is_set() and self._clock.monotonic() < self._deadline

    def _touch(self) -> None:
        # Deepest first, as with all touches.
        keys = [self._keys[position] for position in sorted(self._arrived, reverse=True)]
        self._mount.index.touched(keys)


@dataclass(frozen=True)
class _Read:
    """One read under way."""

    position: int
    entry: Entry
    job: WorkerJob[int | Failure]
