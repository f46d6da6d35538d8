"""Steps of one lane: what is queued on which stream, and which events order it.

Two streams, one for copies across the link and one for kernels, so that both go on at once. A step
of a load:

    copy stream      [slot is free] copy arena -> slot, or straight to the cache [blocks are free]
    kernel stream    [copied] [blocks are free] scatter slot -> cache; from here the slot is free

and of a save:

    kernel stream    [slot is free] [blocks are filled] gather cache -> slot
    copy stream      [gathered] copy slot -> arena, or straight from the cache [blocks are filled];
                     from here the slot is free

In brackets: events that the device waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.kernels import PageAddresses, PageTable
from lmkv_ray.transfer.base import Arena, Ints
from lmkv_ray.transfer.device import Device, Direction, Event, Memory
from lmkv_ray.transfer.health import EngineHealth
from lmkv_ray.transfer.plan import Copies, CopyBatch, CopyPlan
from lmkv_ray.transfer.planner import Planner
from lmkv_ray.transfer.ring import Ring, Table

COPIES = 512
"""Plain copies in one step."""

Registered = Callable[[Arena, Ints], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """What a lane knows of one KV group."""

    planner: Planner
    table: PageTable
    runs: Memory
    """Of ``table``, in the device's memory."""
    block_bytes: int
    per_chunk: int


@dataclass(frozen=True, slots=True)
class Step:
    """Queued work, over when its event is done."""

    event: Event
    table: Table | None
    last: bool
    """Of its job."""


class Stepper:
    """Queues the steps of one lane; the arguments are ``Lane``'s."""

    def __init__(
        self,
        device: Device,
        direction: Direction,
        *,
        cache: int,
        ring: Ring,
        registered: Registered,
    ) -> None:
        self._device = device
        self._direction = direction
        self._cache = cache
        self._ring = ring
        self._registered = registered
        self._copying = device.stream()
        self._packing = device.stream()

    def run(
        self, group: PlannedGroup, arena: Arena, plan: CopyPlan, after: Event
    ) -> Iterator[Step]:
        """Queue a job's steps one by one, to begin after an event."""
        left = len(plan.rows) + plan.plain_steps(COPIES)
        if len(plan.rows):
            self._device.wait(self._packing, after)
        for batch in plan.batches():
            left -= 1
            table = self._ring.take()
            yield Step(self._batch(group, arena, batch, table), table, not left)
        if left:
            self._device.wait(self._copying, after)
        for copies in plan.plain(COPIES):
            left -= 1
            self._copy(arena, self._cache, copies)
            yield Step(self._device.record(self._copying), None, not left)

    def idle(self, health: EngineHealth) -> bool:
        """Whether nothing is under way any more, or nothing can be, as the device is dead."""
        for stream in (self._copying, self._packing):
            try:
                if not self._device.idle(stream):
                    return False
            except Exception as error:
                health.fail(error)
        return True

    def _batch(self, group: PlannedGroup, arena: Arena, batch: CopyBatch, table: Table) -> Event:
        """Queue what passes through one ring slot."""
        device, slot = self._device, self._ring.next_slot()
        launch = group.table.write(
            table.targets,
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
        registered = self._registered(arena, copies.arena)
        in_arena, in_device = copies.arena + arena.data.ctypes.data, copies.other + other
        to, source = (
            (in_device, in_arena)
            if self._direction is Direction.TO_DEVICE
            else (in_arena, in_device)
        )
        if registered.all() or not registered.any():
            parts: list[tuple[slice | npt.NDArray[np.bool_], bool]] = [(slice(None), registered[0])]
        else:
            parts = [(registered, True), (~registered, False)]
        for mine, value in parts:
            self._device.copy(
                self._copying,
                self._direction,
                to[mine],
                source[mine],
                copies.nbytes[mine],
                registered=bool(value),
            )
