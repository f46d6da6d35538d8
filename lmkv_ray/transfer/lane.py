"""One direction of the engine of streams: loads, or saves.

A job is planned, cut into steps, and these are queued on the device's streams (``steps``). ``pump``
does all of the host's part without ever waiting. It queues up to ``AHEAD`` steps, so that the
device need not wait for the host, which the interpreter's lock may hold up for milliseconds (in
which a link moves hundreds of MiB). So a save's deadline is checked when it is queued: it begins
when the step that fills its blocks has ended and what was queued before is over. A save that is
late by that writes into a slot that is still its own.

A job has ended when its last step has, as seen by the host; then a load's generations are checked.
An error of the device ends both lanes for good (``EngineHealth``): what was queued is waited for,
as long as the device answers, and all jobs fail.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lmkv_ray.transfer.base import Arena, Ended, Load, Save
from lmkv_ray.transfer.device import Device, Direction, Event
from lmkv_ray.transfer.health import EngineHealth
from lmkv_ray.transfer.plan import CopyPlan
from lmkv_ray.transfer.ring import Ring
from lmkv_ray.transfer.steps import PlannedGroup, Registered, Step, Stepper

logger = logging.getLogger(__name__)

AHEAD = 64
"""Steps that may be queued and not yet over. With ring slots of 8 MiB some 10 ms of a PCIe 5 link;
CUDA itself takes a thousand before it makes the host wait."""

STEP_SECONDS = 0.15e-3
"""About what a step of 8 MiB takes on such a link."""

LOOK_SECONDS = (0.1e-3, 1e-3)
"""Shortest and longest pause between looks at the device: each costs the interpreter's lock."""


@dataclass(slots=True, eq=False)
class CopyJob:
    """Copies of one KV group that are planned together; one load, or saves of one step."""

    copies: Sequence[Load | Save]
    arena: Arena | None
    """None: the arena of these copies is not attached."""
    offset: int
    """Bytes from the beginning of a slot to this worker's part of it."""
    after: Event
    """Event of the model's stream: the copies wait for all that was queued there before the job."""
    began: float = 0.0


class Lane:
    """See above. ``submit`` and ``take_ended`` are for any thread, all else for one.

    Args:
        device: the device that holds the engine's cache.
        direction: of this lane.
        groups: one per KV group.
        cache: address of the engine's allocation.
        ring: of this lane alone.
        health: of both lanes.
        registered: for offsets in the arena's data, bool[n]: whether they may be copied as
            registered.
        ahead: steps that may be queued and not yet over; the ring has as many tables.
    """

    def __init__(
        self,
        device: Device,
        direction: Direction,
        groups: Sequence[PlannedGroup],
        *,
        cache: int,
        ring: Ring,
        health: EngineHealth,
        registered: Registered,
        ahead: int = AHEAD,
    ) -> None:
        self._device = device
        self._direction = direction
        self._groups = groups
        self._ring = ring
        self._health = health
        self._ahead = ahead
        self._abandoned = False
        self._stepper = Stepper(device, direction, cache=cache, ring=ring, registered=registered)
        self._queue: deque[CopyJob] = deque()
        self._open: list[CopyJob] = []
        self._steps: Iterator[Step] | None = None
        self._flight: deque[tuple[Step, CopyJob]] = deque()
        self._ended: deque[Ended] = deque()

    # -- for any thread -------------------------------------------------------------------------

    def submit(self, job: CopyJob) -> None:
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

    def pause(self) -> float:
        """Seconds until it is worth to come back: about half of what is left of the work in flight.

        So the end of a job is seen soon after it, and a job that waits for the model, or is long,
        is looked at rarely.
        """
        shortest, longest = LOOK_SECONDS
        if self._health.broken or not self._flight:
            return longest
        try:
            begun = self._device.done(self._flight[0][1].after)
        except Exception as error:
            self._health.fail(error)
            return longest
        half = len(self._flight) * STEP_SECONDS / 2
        return min(longest, max(shortest, half)) if begun else longest

    def pump(self) -> bool:
        """Do what can be done without waiting. Returns whether it is worth to come back soon."""
        if not self._health.broken:
            try:
                while self._flight and self._device.done(self._flight[0][0].event):
                    self._retire(*self._flight.popleft())
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
        elif (step := next(self._steps, None)) is None:
            self._steps = None
        else:
            self._flight.append((step, self._open[-1]))
        return True

    def _begin(self, job: CopyJob) -> None:
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
                alone = [CopyJob([c], job.arena, job.offset, job.after) for c in job.copies]
                self._queue.extendleft(reversed(alone))
                return
            logger.exception("lmkv_ray: a copy was refused; its tokens are recomputed")
            self._end(job, ok=False)
            return
        job.began = time.perf_counter()
        if plan.empty:
            self._end(job, ok=True)
        else:
            group = self._groups[job.copies[0].group]
            self._steps = self._stepper.run(group, job.arena, plan, job.after)

    def _plan(self, job: CopyJob, arena: Arena) -> CopyPlan:
        group = self._groups[job.copies[0].group]
        slots = np.concatenate([copy.slots for copy in job.copies])
        blocks = np.concatenate([copy.blocks for copy in job.copies])
        if self._direction is Direction.FROM_DEVICE and (
            any(len(c.blocks) != len(c.slots) * group.per_chunk for c in job.copies)
        ):
            raise IndexError("a save of chunks that are not whole")
        return group.planner.plan(
            arena.offsets(slots, job.offset + group.planner.chunk_bytes) + job.offset,
            blocks,
            skip=job.copies[0].skip,
            arena_bytes=len(arena.data),
            extent_bytes=arena.extent_bytes,
        )

    # -- ends -----------------------------------------------------------------------------------

    def _retire(self, step: Step, job: CopyJob) -> None:
        if step.table is not None:
            self._ring.give(step.table)
        if step.last:
            self._end(job, ok=True)

    def _give_up(self) -> None:
        """The device is broken: fail everything, once nothing that was queued can still happen."""
        if not self._stepper.idle(self._health):
            return
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

    def _end(self, job: CopyJob, *, ok: bool, only: Sequence[Load | Save] | None = None) -> None:
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

    def _good(self, job: CopyJob, load: Load) -> int:
        """Leading chunks that kept their generation until the copy was over."""
        try:
            assert job.arena is not None
            unchanged = job.arena.unchanged(load.slots, load.generations)
            return len(unchanged) if unchanged.all() else int(np.argmin(unchanged))
        except Exception:
            logger.exception("lmkv_ray: a load cannot be checked; its tokens are recomputed")
            return 0
