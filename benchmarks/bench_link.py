"""What a lane adds to the time of a PCIe 5 link, simulated: planning, queueing, seeing the end.

    link       8 and 64 chunks of 32 MiB, from the job's submission to its report, against the bare
               time of the link for their bytes: through the ring (scattered pages of 64 KiB), and
               by plain copies (blocks in order). Goal: 0.95

Time is that of a simulation: the lane's thread takes the processor time that it takes, as if a core
were its own; copies take what the link takes, one after the other; pauses take what they say. So
machines with other work give the same figures. Kernels take a tenth of the link's time, beside it.
Run as ``python -m benchmarks.bench_link``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.table import Row, show
from lmkv_ray.config import Settings
from lmkv_ray.kernels import PageAddresses, PageLaunch
from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.transfer import Load, Save
from lmkv_ray.transfer.device import Direction
from lmkv_ray.transfer.device_engine import RING_SLOTS, make_group
from lmkv_ray.transfer.health import EngineHealth
from lmkv_ray.transfer.host_device import HostDevice
from lmkv_ray.transfer.lane import AHEAD, CopyJob, Lane
from lmkv_ray.transfer.ring import Ring

Ints = npt.NDArray[np.int64]

LINK = 55e9
"""Bytes per second, each way, as measured on an H100."""
KERNEL = 10 * LINK
LAYERS, PER_CHUNK, PAGE = 32, 16, 64 << 10
COUNTS = [8, 64]
ROUNDS = 30
GOAL = 0.95
CACHE = 1 << 41
"""An address that nothing touches."""
RING_SLOT = int(Settings.model_fields["gpu_ring_bytes"].default) // (2 * RING_SLOTS)
DIRECT_BYTES = int(Settings.model_fields["direct_copy_bytes"].default)


class Clock:
    """Processor time of this thread, and the pauses it made."""

    def __init__(self) -> None:
        self.paused = 0.0

    def now(self) -> float:
        """Seconds."""
        return time.thread_time() + self.paused


@dataclass(slots=True)
class _Stream:
    free: float = 0.0
    """When all is done that was queued."""


class SimulatedGpu(HostDevice):
    """Nothing is copied; an event is the time at which it comes to pass."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._link_free = 0.0

    def stream(self) -> _Stream:
        """See ``Device``."""
        return _Stream()

    def record(self, stream: _Stream) -> float:
        """See ``Device``."""
        return max(stream.free, self._clock.now())

    def wait(self, stream: _Stream, event: float) -> None:
        """See ``Device``."""
        stream.free = max(stream.free, event)

    def done(self, event: float) -> bool:
        """See ``Device``."""
        return self._clock.now() >= event

    def copy(
        self,
        stream: _Stream,
        direction: Direction,
        to: Ints,
        source: Ints,
        nbytes: Ints,
        *,
        registered: bool,
    ) -> None:
        """See ``Device``."""
        begin = max(self._link_free, stream.free, self._clock.now())
        self._link_free = stream.free = begin + int(nbytes.sum()) / LINK

    def gather(self, stream: _Stream, launch: PageLaunch, at: PageAddresses) -> None:
        """See ``Device``."""
        begin = max(stream.free, self._clock.now())
        stream.free = begin + launch.targets * launch.runs * launch.page_bytes / KERNEL

    scatter = gather


class StillArena:
    """Slots in some memory, none of which ever changes."""

    arena_id = 0
    grown = False

    def __init__(self, data: npt.NDArray[np.uint8], slot_bytes: int) -> None:
        self.data = data
        self.extent_bytes = len(data)
        self._slot_bytes = slot_bytes

    def offsets(self, slots: Ints, nbytes: int) -> Ints:
        return slots * self._slot_bytes

    def unchanged(self, slots: Ints, generations: Any) -> npt.NDArray[np.bool_]:
        return np.ones(len(slots), np.bool_)

    def assigned(self) -> list[tuple[int, int]]:
        return []

    def populate(self) -> Any:
        return iter(())


def run() -> list[Row]:
    """One row for each direction, way and count."""
    rows = []
    for count in COUNTS:
        in_order = np.arange(count * PER_CHUNK)
        scattered = np.random.default_rng(0).permutation(2 * count * PER_CHUNK)[: len(in_order)]
        for way, blocks in (("through the ring", scattered), ("by plain copies", in_order)):
            for direction in Direction:
                rows.append(_measure(direction, way, count, blocks))  # noqa: PERF401
    return rows


def _measure(direction: Direction, way: str, count: int, blocks: Ints) -> Row:
    pages = 2 * count * PER_CHUNK
    runs = tuple(Run(layer * pages * PAGE, PAGE, PAGE) for layer in range(LAYERS))
    layout = ChunkLayout(runs, PER_CHUNK, pages)
    clock = Clock()
    # Nobody touches it: one byte, over and over.
    memory = np.broadcast_to(np.zeros(1, np.uint8), count * layout.chunk_bytes)
    device, arena = SimulatedGpu(clock), StillArena(memory, layout.chunk_bytes)
    group = make_group(
        device,
        layout,
        cache_bytes=pages * PAGE * LAYERS,
        slot_bytes=RING_SLOT,
        direct_bytes=DIRECT_BYTES,
    )
    lane = Lane(
        device,
        direction,
        [group],
        cache=CACHE,
        ring=Ring(
            device,
            slots=RING_SLOTS,
            slot_bytes=RING_SLOT,
            tables=AHEAD,
            targets=group.planner.targets,
        ),
        health=EngineHealth("the benchmark"),
        registered=lambda arena, at: np.ones(len(at), np.bool_),
    )
    samples = []
    for _ in range(ROUNDS):
        slots, began = np.arange(count), clock.now()
        copy: Load | Save = (
            Load(0, slots, np.zeros(count, np.uint64), blocks)
            if direction is Direction.TO_DEVICE
            else Save(0, slots, blocks, time.monotonic() + 60)
        )
        lane.submit(CopyJob([copy], arena, 0, 0.0))
        while lane.pump():
            clock.paused += lane.pause()
        samples.append(clock.now() - began)
        assert all(ended.ok for ended in lane.take_ended())
    taken, bare = median(samples), count * layout.chunk_bytes / LINK
    kind = "load" if direction is Direction.TO_DEVICE else "save"
    name = f"{kind} {count} chunks of 32 MiB over a simulated link, {way}"
    return Row(name, 1e3 * taken, "ms", 1e3 * bare / GOAL, bare / taken)


if __name__ == "__main__":
    show(run())
