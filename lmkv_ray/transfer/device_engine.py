"""The engine of streams: both lanes, each on a thread of its own.

The threads only plan, queue and poll, all of it without the interpreter's lock where it takes time.
Calls of the engine's thread cost it a queued event and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from lmkv_ray.kernels import PageTable
from lmkv_ray.layout import ChunkLayout
from lmkv_ray.transfer.base import Arena, Ended, Load, Save
from lmkv_ray.transfer.device import Device, Direction, Event
from lmkv_ray.transfer.health import EngineHealth
from lmkv_ray.transfer.lane import AHEAD, CopyJob, Lane
from lmkv_ray.transfer.planner import Planner
from lmkv_ray.transfer.registration import Registration
from lmkv_ray.transfer.ring import Ring
from lmkv_ray.transfer.steps import PlannedGroup

logger = logging.getLogger(__name__)

RING_SLOTS = 4
"""Of each lane: while one is filled and one emptied, two smooth out what is uneven."""

LOAD_PATIENCE = 0.010
"""Seconds an otherwise idle step waits for its loads: finer than the engine's own polling."""

PATIENCE_STEP = 0.001
"""Between looks at these."""

CLOSE_SECONDS = 10.0
"""Within which what is under way must have ended, or is left to the end of the process."""

TOGETHER = 64
"""Saves of one step that are planned together, and end together."""


class DeviceEngine:
    """A ``TransferEngine`` over one allocation in a device's memory.

    Args:
        layouts: one per KV group.
        device: the device that holds the engine's cache.
        cache: address of the engine's allocation; the layouts' offsets count from it.
        cache_bytes: its size.
        ring_bytes: of the device's memory, for both lanes together; 0: no kernels, plain copies
            only.
        direct_bytes: chunks whose pieces have this size or more, on the mean, are copied without
            the ring.

    Raises:
        IndexError: a layout reaches beyond the allocation.
        DeviceError: the device has no memory for the ring.
    """

    def __init__(
        self,
        layouts: Sequence[ChunkLayout],
        device: Device,
        *,
        cache: int,
        cache_bytes: int,
        ring_bytes: int,
        direct_bytes: int,
    ) -> None:
        device.enter()
        self._device = device
        self._health = EngineHealth(f"the transfer engine on {device.name}")
        self._registration = Registration(device)
        slot_bytes = ring_bytes // (2 * RING_SLOTS) // 4096 * 4096
        groups = [
            make_group(
                device,
                layout,
                cache_bytes=cache_bytes,
                slot_bytes=slot_bytes,
                direct_bytes=direct_bytes,
            )
            for layout in layouts
        ]
        self._lanes: dict[Direction, Lane] = {}
        self._wakes: dict[Direction, threading.Event] = {}
        for direction in Direction:
            ring = Ring(
                device,
                slots=RING_SLOTS,
                slot_bytes=slot_bytes,
                tables=AHEAD,
                targets=max(group.planner.targets for group in groups),
            )
            self._lanes[direction] = Lane(
                device,
                direction,
                groups,
                cache=cache,
                ring=ring,
                health=self._health,
                registered=self._registration.covers,
            )
            self._wakes[direction] = threading.Event()
        self._arena: tuple[Arena, list[int]] | None = None
        self._closing = False
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(direction,),
                name=f"lmkv-{direction.name.lower()}",
                daemon=True,
            )
            for direction in Direction
        ]
        for thread in self._threads:
            thread.start()
        logger.info(
            "lmkv_ray: loads and saves by %s: a ring of %d MiB of its memory "
            "(2 x %d slots of %.1f MiB); runs of %d KiB and more go by plain copies.",
            device.name,
            2 * RING_SLOTS * slot_bytes >> 20,
            RING_SLOTS,
            slot_bytes / 2**20,
            direct_bytes >> 10,
        )

    def prepare(self, arena: Arena, within: float) -> None:
        """See ``TransferEngine``."""
        began = time.monotonic()
        done, whole = self._registration.prepare(arena, within)
        logger.info(
            "lmkv_ray: %s registered %.1f of %.1f GiB of the node's arena in %.1f s.",
            self._device.name,
            done / 2**30,
            whole / 2**30,
            time.monotonic() - began,
        )

    def attach(self, arena: Arena, offsets: Sequence[int]) -> None:
        """See ``TransferEngine``."""
        self._arena = (arena, list(offsets))
        self._registration.attach(arena)

    def begin_loads(self, loads: Sequence[Load], *, idle: bool) -> None:
        """See ``TransferEngine``."""
        self._registration.look()
        if loads:
            after = self._mark()
            for load in loads:
                self._submit(Direction.TO_DEVICE, [load], after)
        deadline = time.monotonic() + LOAD_PATIENCE
        lane = self._lanes[Direction.TO_DEVICE]
        while idle and lane.busy and time.monotonic() < deadline:
            time.sleep(PATIENCE_STEP)

    def begin_saves(self, saves: Sequence[Save]) -> None:
        """See ``TransferEngine``."""
        if not saves:
            return
        after = self._mark()
        for _, alike in groupby(saves, key=lambda save: (save.group, save.arena_id)):
            together = list(alike)
            for first in range(0, len(together), TOGETHER):
                self._submit(Direction.FROM_DEVICE, together[first : first + TOGETHER], after)

    def ended(self) -> list[Ended]:
        """See ``TransferEngine``."""
        return [ended for lane in self._lanes.values() for ended in lane.take_ended()]

    def close(self) -> None:
        """See ``TransferEngine``."""
        self._closing = True
        for wake in self._wakes.values():
            wake.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            logger.warning(
                "lmkv_ray: copies are still under way after %.0f s; their memory is left to the "
                "end of the process.",
                CLOSE_SECONDS,
            )
            return
        self._registration.close()
        self._arena = None

    def _mark(self) -> Event | None:
        try:
            return self._device.mark()
        except Exception as error:
            self._health.fail(error)
            return None

    def _submit(self, direction: Direction, copies: Sequence[Load | Save], after: Event) -> None:
        arena, offset = None, 0
        if self._arena is not None and self._arena[0].arena_id == copies[0].arena_id:
            arena, offset = self._arena[0], self._arena[1][copies[0].group]
        self._lanes[direction].submit(CopyJob(copies, arena, offset, after))
        self._wakes[direction].set()

    def _work(self, direction: Direction) -> None:
        """A lane's thread."""
        lane, wake = self._lanes[direction], self._wakes[direction]
        try:
            self._device.enter()
        except Exception as error:
            self._health.fail(error)
        while True:
            wake.clear()
            if self._closing:
                lane.abandon()
            if lane.pump():
                wake.wait(lane.pause())
            elif self._closing:
                return
            else:
                wake.wait()


def make_group(
    device: Device, layout: ChunkLayout, *, cache_bytes: int, slot_bytes: int, direct_bytes: int
) -> PlannedGroup:
    """What lanes need to know of a KV group."""
    table = PageTable(layout, cache_bytes=cache_bytes)
    return PlannedGroup(
        Planner(layout, slot_bytes=slot_bytes, direct_bytes=direct_bytes),
        table,
        device.upload(table.runs.view(np.uint8)),
        layout.block_bytes,
        layout.blocks,
    )
