"""One direction of the engine of streams: loads, or saves.

A job is planned, cut into steps, and its steps are queued on two streams: one for copies across the
link, one for kernels, which overlap. A step of a load:

    copy stream      [slot is free] copy arena -> slot, or straight to the cache [blocks are free]
    kernel stream    [copied] [blocks are free] scatter slot -> cache; from here the slot is free

and of a save:

    kernel stream    [slot is free] [blocks are filled] gather cache -> slot
    copy stream      [gathered] copy slot -> arena, or straight from the cache [blocks are filled];
                     from here the slot is free

In brackets: events that are waited for, by the device. ``pump`` does all of the host's part without
ever waiting. It queues up to ``AHEAD`` steps, so that the device need not wait for the host, which
may be held up by the interpreter's lock for milliseconds.

A job has ended when its last step has, as seen by the host; then a load's generations are checked.
An error of the device ends both lanes for good (``Health``): what was queued is waited for, as long
as the device answers, and all jobs fail.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.kernels import PageAddresses, PageTable
from lmkv_ray.transfer.base import Arena, Ended, Ints, Load, Save
from lmkv_ray.transfer.device import Device, Direction, Event, Memory, Stream
from lmkv_ray.transfer.health import Health
from lmkv_ray.transfer.plan import Batch, Copies, Plan, Planner
from lmkv_ray.transfer.staging import Ring, Table

logger = logging.getLogger(__name__)

AHEAD = 64
"""Steps that may be queued and not yet over. With ring slots of 8 MiB some 10 ms of a PCIe 5 link;
CUDA itself takes a thousand before it makes the host wait."""

COPIES = 256
"""Plain copies in one step."""

Pinned = Callable[[Arena, Ints], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Group:
    """What a lane knows of one KV group."""

    planner: Planner
    table: PageTable
    runs: Memory
    """Of ``table``, in the device's memory."""
    block_bytes: int
    per_chunk: int


@dataclass(slots=True, eq=False)
class Job:
    """Copies of one KV group that are planned together; one load, or saves of one step."""

    copies: Sequence[Load | Save]
    arena: Arena | None
    """None: the arena of these copies is not attached."""
    offset: int
    """Of this worker's part in a slot."""
    after: Event
    """What was given to the model's stream before."""
    began: float = 0.0


@dataclass(frozen=True, slots=True)
class _Step:
    """Queued work, over when its event is done."""

    event: Event
    table: Table | None
    last_of: Job | None
    """The job that ends with it."""


class Lane:
    """See above. ``submit`` and ``take_ended`` are for any thread, all else for one.

    Args:
        device: of the cache.
        direction: of this lane.
        groups: one per KV group.
        cache: address of the engine's allocation.
        ring: of this lane alone.
        health: of both lanes.
        pinned: for offsets in the arena's data, bool[n]: whether they may be copied as pinned.
        ahead: steps that may be queued and not yet over; the ring has as many tables.
    """

    def __init__(
        self,
        device: Device,
        direction: Direction,
        groups: Sequence[Group],
        *,
        cache: int,
        ring: Ring,
        health: Health,
        pinned: Pinned,
        ahead: int = AHEAD,
    ) -> None:
        self._device = device
        self._direction = direction
        self._groups = groups
        self._cache = cache
        self._ring = ring
        self._health = health
        self._pinned = pinned
        self._ahead = ahead
        self._abandoned = False
        self._copying: Stream = device.stream()
        self._packing: Stream = device.stream()
        self._queue: deque[Job] = deque()
        self._open: list[Job] = []
        self._steps: Iterator[None] | None = None
        self._flight: deque[_Step] = deque()
        self._ended: deque[Ended] = deque()

    # -- for any thread -------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._queue.append(job)

    def take_ended(self) -> list[Ended]:
        """What ended since the last call."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    @property
    def busy(self) -> bool:
        """Whether any job has not ended."""
        return bool(self._queue or self._open)

    # -- for the lane's thread ------------------------------------------------------------------

    def pump(self) -> bool:
        """Do what can be done without waiting. Returns whether it is worth to come back soon."""
        if not self._health.broken:
            try:
                while self._flight and self._device.done(self._flight[0].event):
                    self._retire(self._flight.popleft())
                while len(self._flight) < self._ahead and self._advance():
                    pass
            except Exception as error:
                self._health.fail(error)
        if self._health.broken:
            self._give_up()
        return self.busy

    def abandon(self) -> None:
        """Queue nothing more. Jobs that were not queued whole fail when what was queued is over."""
        self._abandoned = True

    def _advance(self) -> bool:
        """Queue one step, or begin the next job; False if there is nothing to do."""
        if self._abandoned:
            if not self._flight:
                self._fail_all()
            return False
        if self._steps is None:
            if not self._queue:
                return False
            self._begin(self._queue.popleft())
        elif next(self._steps, self) is self:
            self._steps = None
        return True

    def _begin(self, job: Job) -> None:
        """Refuse a job, or plan it."""
        self._open.append(job)
        if job.arena is None:
            self._end(job, ok=False)
            return
        late = [c for c in job.copies if isinstance(c, Save) and time.monotonic() > c.deadline]
        if late:
            self._end(job, ok=False, only=late)
            job.copies = [copy for copy in job.copies if copy not in late]
            if not job.copies:
                self._open.remove(job)
                return
        try:
            plan = self._plan(job, job.arena)
        except Exception:
            self._open.remove(job)
            if len(job.copies) > 1:  # find out whose fault it is
                alone = [Job([c], job.arena, job.offset, job.after) for c in job.copies]
                self._queue.extendleft(reversed(alone))
                return
            logger.exception("lmkv_ray: a copy was refused; its tokens are recomputed")
            self._end(job, ok=False)
            return
        job.began = time.perf_counter()
        steps = len(plan.rows) + plan.plain_steps(COPIES)
        if steps:
            self._steps = self._run(job, job.arena, plan, steps)
        else:
            self._end(job, ok=True)

    def _plan(self, job: Job, arena: Arena) -> Plan:
        group = self._groups[job.copies[0].group]
        slots = np.concatenate([copy.slots for copy in job.copies])
        blocks = np.concatenate([copy.blocks for copy in job.copies])
        if self._direction is Direction.FROM_DEVICE and (
            any(len(c.blocks) != len(c.slots) * group.per_chunk for c in job.copies)
        ):
            raise IndexError("a save of chunks that are not whole")
        return group.planner.plan(
            arena.offsets(slots) + job.offset,
            blocks,
            skip=job.copies[0].skip,
            arena_bytes=len(arena.data),
            extent_bytes=arena.extent_bytes,
        )

    # -- steps ----------------------------------------------------------------------------------

    def _run(self, job: Job, arena: Arena, plan: Plan, left: int) -> Iterator[None]:
        """Queue a job's steps one by one; there are ``left``."""
        group = self._groups[job.copies[0].group]
        if len(plan.rows):
            self._device.wait(self._packing, job.after)
        for batch in plan.batches():
            left -= 1
            table = self._ring.take()
            event = self._batch(group, arena, batch, table)
            self._flight.append(_Step(event, table, None if left else job))
            yield
        if left:
            self._device.wait(self._copying, job.after)
        for copies in plan.plain(COPIES):
            left -= 1
            self._copy(arena, self._cache, copies)
            event = self._device.record(self._copying)
            self._flight.append(_Step(event, None, None if left else job))
            yield

    def _batch(self, group: Group, arena: Arena, batch: Batch, table: Table) -> Event:
        """Queue what passes through one ring slot."""
        device, slot = self._device, self._ring.next_slot()
        launch = group.table.write(
            table.places,
            batch.chunks,
            batch.indices,
            batch.blocks,
            buffer_bytes=self._ring.slot_bytes,
            runs=batch.runs,
        )
        at = PageAddresses(self._cache, slot.address, group.runs.address, table.address)
        if self._direction is Direction.TO_DEVICE:
            if slot.free is not None:
                device.wait(self._copying, slot.free)
            self._copy(arena, slot.address, batch.copies)
            device.wait(self._packing, device.record(self._copying))
            device.scatter(self._packing, launch, at)
            slot.free = device.record(self._packing)
        else:
            if slot.free is not None:
                device.wait(self._packing, slot.free)
            device.gather(self._packing, launch, at)
            device.wait(self._copying, device.record(self._packing))
            self._copy(arena, slot.address, batch.copies)
            slot.free = device.record(self._copying)
        return slot.free

    def _copy(self, arena: Arena, other: int, copies: Copies) -> None:
        """Queue plain copies between the arena and the device's memory from ``other`` on."""
        pinned = self._pinned(arena, copies.arena)
        in_arena, in_device = copies.arena + arena.data.ctypes.data, copies.other + other
        to, source = (
            (in_device, in_arena)
            if self._direction is Direction.TO_DEVICE
            else (in_arena, in_device)
        )
        for value in (True, False):
            mine = pinned == value
            if mine.any():
                self._device.copy(
                    self._copying,
                    self._direction,
                    to[mine],
                    source[mine],
                    copies.nbytes[mine],
                    pinned=value,
                )

    # -- ends -----------------------------------------------------------------------------------

    def _retire(self, step: _Step) -> None:
        if step.table is not None:
            self._ring.give(step.table)
        if step.last_of is not None:
            self._end(step.last_of, ok=True)

    def _give_up(self) -> None:
        """The device is broken: fail everything, once nothing that was queued can still happen."""
        for stream in (self._copying, self._packing):
            try:
                if not self._device.idle(stream):
                    return
            except Exception as error:  # then nothing happens there any more
                self._health.fail(error)
        self._flight.clear()
        self._ring.reclaim()
        self._fail_all()

    def _fail_all(self) -> None:
        """Nothing is under way any more."""
        self._steps = None
        while self._queue:
            self._open.append(self._queue.popleft())
        for job in list(self._open):
            self._end(job, ok=False)

    def _end(self, job: Job, *, ok: bool, only: Sequence[Load | Save] | None = None) -> None:
        """Report copies of a job, by default all, and then forget it."""
        seconds = time.perf_counter() - job.began if job.began else 0.0
        for copy in job.copies if only is None else only:
            good = len(copy.slots) if ok else 0
            if ok and isinstance(copy, Load):
                good = self._good(job, copy)
            fine = ok and good == len(copy.slots)
            nbytes = len(copy.blocks) * self._groups[copy.group].block_bytes if ok else 0
            self._ended.append(Ended(copy, fine, good, nbytes, seconds / len(job.copies)))
        if only is None and job in self._open:
            self._open.remove(job)

    def _good(self, job: Job, load: Load) -> int:
        """Leading chunks that kept their generation until the copy was over."""
        try:
            assert job.arena is not None
            unchanged = job.arena.unchanged(load.slots, load.generations)
            return len(unchanged) if unchanged.all() else int(np.argmin(unchanged))
        except Exception:
            logger.exception("lmkv_ray: a load cannot be checked; its tokens are recomputed")
            return 0
