"""A device that does whatever streams and events allow, and no less.

Work is queued, and done by ``step``: the head of any stream may be next, if it does not wait for an
event. Copies are torn into halves that are done in any order of streams; kernels read their tables
when they run. So an order that no event forces is not kept in some schedule, and shows as wrong
bytes.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lmkv_ray.kernels import PageAddresses, PageLaunch
from lmkv_ray.transfer.base import Ints
from lmkv_ray.transfer.device import DeviceError, Direction
from lmkv_ray.transfer.host_device import HostDevice, pages


@dataclass(eq=False)
class Recorded:
    """An event."""

    origin: str
    passed: bool = False


@dataclass(eq=False)
class Queue:
    """A stream: a queue of work, whose head may be an event to wait for."""

    name: str
    weight: float
    work: deque[Recorded | Callable[[], object]] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        if not self.work:
            return False
        head = self.work[0]
        return not isinstance(head, Recorded) or head.passed


class ShuffledDevice(HostDevice):
    """Streams are named in the order in which they are made, "compute" being there first.

    Args:
        seed: of the schedule.
        names: of the streams to be made.
        dropped: (waiting stream, stream of the event): waits that are forgotten.
        fail_at: number of the call that raises, and all calls after it, if ``dead``.
    """

    def __init__(
        self,
        seed: int,
        names: tuple[str, ...] = ("load copy", "load kernel", "save copy", "save kernel"),
        *,
        dropped: tuple[str, str] | None = None,
        fail_at: int | None = None,
        dead: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self._names = list(names)
        self._dropped = dropped
        self._fail_at = fail_at
        self._dead = dead
        self.calls = 0
        self.waits: set[tuple[str, str]] = set()
        self.compute = self._queue("compute")
        self.queues = [self.compute]

    # -- Device ---------------------------------------------------------------------------------

    def stream(self) -> Queue:
        self._call()
        self.queues.append(self._queue(self._names.pop(0)))
        return self.queues[-1]

    def mark(self) -> Recorded:
        return self.record(self.compute)

    def record(self, stream: Queue) -> Recorded:
        self._call()
        event = Recorded(stream.name)
        stream.work.append(lambda: setattr(event, "passed", True))
        return event

    def wait(self, stream: Queue, event: Recorded) -> None:
        self._call()
        kind = (stream.name, event.origin)
        self.waits.add(kind)
        if kind != self._dropped:
            stream.work.append(event)

    def done(self, event: Recorded) -> bool:
        self._call()
        return event.passed

    def idle(self, stream: Queue) -> bool:
        self._call()
        return not stream.work

    def copy(
        self,
        stream: Queue,
        direction: Direction,
        to: Ints,
        source: Ints,
        nbytes: Ints,
        *,
        registered: bool,
    ) -> None:
        self._call()
        for each in zip(to.tolist(), source.tolist(), nbytes.tolist(), strict=True):
            self._tear(stream, *each)

    def gather(self, stream: Queue, launch: PageLaunch, at: PageAddresses) -> None:
        self._call()
        self._kernel(stream, launch, at, gather=True)

    def scatter(self, stream: Queue, launch: PageLaunch, at: PageAddresses) -> None:
        self._call()
        self._kernel(stream, launch, at, gather=False)

    # -- the schedule ---------------------------------------------------------------------------

    def step(self) -> bool:
        """Do one piece of work; False if there is none."""
        ready = [queue for queue in self.queues if queue.ready]
        if not ready:
            assert not any(queue.work for queue in self.queues), "a deadlock"
            return False
        [queue] = self.random.choices(ready, [queue.weight for queue in ready])
        work = queue.work.popleft()
        if not isinstance(work, Recorded):
            work()
        return True

    def _queue(self, name: str) -> Queue:
        # Some streams much slower than others: far more of the orders that matter are seen.
        return Queue(name, self.random.choice([1, 1, 30, 1000]))

    def _tear(self, stream: Queue, to: int, source: int, nbytes: int) -> None:
        half = nbytes // 2
        for at, size in ((0, half), (half, nbytes - half)):
            stream.work.append(partial(ctypes.memmove, to + at, source + at, size))

    def _kernel(
        self, stream: Queue, launch: PageLaunch, at: PageAddresses, *, gather: bool
    ) -> None:
        # A kernel runs page by page, and reads its table when it comes to it.
        def page(i: int) -> None:
            in_cache, in_buffer, nbytes = pages(launch, at)[i]
            to, source = (in_buffer, in_cache) if gather else (in_cache, in_buffer)
            ctypes.memmove(to, source, nbytes)

        for i in range(launch.targets * launch.runs):
            stream.work.append(partial(page, i))

    def _call(self) -> None:
        number, self.calls = self.calls, self.calls + 1
        if self._fail_at is not None and (
            number == self._fail_at or (self._dead and number > self._fail_at)
        ):
            for queue in self.queues if self._dead else ():
                queue.work.clear()  # a dead context does nothing more
            raise DeviceError(f"injected at call {number}")
