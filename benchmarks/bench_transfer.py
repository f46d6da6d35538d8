"""What the transfer engine costs beside the copies, where the device is the host itself.

    plan       2,000 chunks of 32 layers; milliseconds, at most 2: blocks in order, scattered pages
               that are long enough for plain copies, and blocks through the ring
    load, save 32 chunks of 8 MiB between an arena and a cache, plan to report, against memcpy of
               the same pieces by a thread that is looked at as often: at most 5% longer (0.95)
    queue      the host's part of 8 MiB through the ring (plan, table, six calls) on a device that
               does nothing; microseconds, at most what a PCIe 5 link takes for the 8 MiB

Everything is timed by the processor time it takes, of its thread or (for copies) of all threads, so
that it matters little what else the cores are busy with. Both sides of a comparison alternate over
the same memory, which begins at a page, and the median of their ratios counts. Run as
``python -m benchmarks.bench_transfer``.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bench_link import LINK, StillArena
from benchmarks.table import rows_of, show
from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.transfer import DeviceEngine, Load, Save
from lmkv_ray.transfer.device import Direction
from lmkv_ray.transfer.device_engine import make_group
from lmkv_ray.transfer.health import EngineHealth
from lmkv_ray.transfer.host_device import HostDevice
from lmkv_ray.transfer.lane import AHEAD, CopyJob, Lane
from lmkv_ray.transfer.planner import Planner
from lmkv_ray.transfer.ring import Ring

Ints = npt.NDArray[np.int64]
Row = dict[str, Any]

CHUNKS = 2_000
LAYERS = 32
PLAN_GOAL_MS = 2.0
PLAN_ROUNDS = 50

MOVED = 32
"""Chunks of 8 MiB in one load or save: 256 MiB, more than a last-level cache."""
PER_CHUNK = 16
PAGE = (8 << 20) // LAYERS // PER_CHUNK
COPY_GOAL = 0.95
COPY_ROUNDS = 41
LOOK_SECONDS = 0.005
"""Between looks at what has ended: as often as a model makes steps."""

RING_SLOT = 8 << 20
DIRECT_BYTES = 128 << 10


def run() -> list[Row]:
    """All figures, as rows {name, value, unit, floor, ratio}.

    ``ratio`` is goal / value for times, and plain / ours for copies (1: no overhead).
    """
    return [*plans(), queue(), *copies()]


def plans() -> list[Row]:
    """Milliseconds to plan a load of 2,000 chunks."""
    rng = np.random.default_rng(0)
    kinds: list[tuple[str, int, int, Callable[[int], Ints]]] = [
        ("16 blocks in order", 16, 16 << 10, np.arange),
        ("1 block of 256 KiB a layer, scattered", 1, 256 << 10, rng.permutation),
        ("16 blocks of 16 KiB a layer, scattered", 16, 16 << 10, rng.permutation),
    ]
    rows = []
    for name, per_chunk, page, order in kinds:
        blocks = CHUNKS * per_chunk
        layout = _layout(blocks, per_chunk, page)
        planner = Planner(layout, slot_bytes=RING_SLOT, direct_bytes=DIRECT_BYTES)
        chunks = rng.permutation(CHUNKS) * layout.chunk_bytes
        ids = order(blocks)
        samples = []
        for _ in range(PLAN_ROUNDS):
            began = time.thread_time()
            planner.plan(
                chunks,
                ids,
                skip=0,
                arena_bytes=CHUNKS * layout.chunk_bytes,
                extent_bytes=256 << 20,
            )
            samples.append(time.thread_time() - began)
        value = median(samples) * 1e3
        rows.append(
            {
                "name": f"plan {CHUNKS} chunks x {LAYERS} layers: {name}",
                "value": round(value, 2),
                "unit": "ms",
                "floor": PLAN_GOAL_MS,
                "ratio": round(PLAN_GOAL_MS / value, 2),
            }
        )
    return rows


def queue() -> Row:
    """Microseconds of the host's thread for each 8 MiB batch of a save of scattered pages."""
    layout = _layout(MOVED * PER_CHUNK, PER_CHUNK, PAGE)
    device, arena = (
        _IdleDevice(),
        StillArena(_memory(MOVED * layout.chunk_bytes), layout.chunk_bytes),
    )
    sizes = {"slot_bytes": RING_SLOT, "direct_bytes": layout.chunk_bytes}
    group = make_group(device, layout, cache_bytes=MOVED * layout.chunk_bytes, **sizes)
    ring = Ring(device, slots=4, slot_bytes=RING_SLOT, tables=AHEAD, targets=group.planner.targets)
    lane = Lane(
        device,
        Direction.FROM_DEVICE,
        [group],
        cache=0,
        ring=ring,
        health=EngineHealth("the benchmark"),
        registered=lambda arena, at: np.ones(len(at), np.bool_),
    )
    ids = np.random.default_rng(0).permutation(MOVED * PER_CHUNK)
    samples = []
    for _ in range(PLAN_ROUNDS):
        began = time.thread_time()
        saves = [Save(0, np.arange(MOVED), ids, time.monotonic() + 60)]
        lane.submit(CopyJob(saves, arena, 0, None))
        while lane.pump():
            pass
        samples.append(time.thread_time() - began)
        assert all(ended.ok for ended in lane.take_ended())
    value = median(samples) / MOVED * 1e6
    goal = RING_SLOT / LINK * 1e6
    return {
        "name": "queue 8 MiB through the ring",
        "value": round(value, 1),
        "unit": "us",
        "floor": round(goal, 1),
        "ratio": round(goal / value, 2),
    }


def copies() -> list[Row]:
    """Speed of loads and saves by the engine, relative to memcpy of the same bytes."""
    blocks = MOVED * PER_CHUNK
    layout = _layout(blocks, PER_CHUNK, PAGE)
    cache = _memory(MOVED * layout.chunk_bytes)
    arena = StillArena(_memory(MOVED * layout.chunk_bytes), layout.chunk_bytes)
    engine = DeviceEngine(
        [layout],
        HostDevice(),
        cache=cache.ctypes.data,
        cache_bytes=len(cache),
        ring_bytes=8 * RING_SLOT,
        direct_bytes=DIRECT_BYTES,
    )
    engine.attach(arena, [0])
    slots, ids = np.arange(MOVED), np.arange(blocks)
    generations = np.zeros(MOVED, np.uint64)

    def wait() -> None:
        while not engine.ended():
            time.sleep(LOOK_SECONDS)

    def load() -> None:
        engine.begin_loads([Load(0, slots, generations, ids)], idle=False)
        wait()

    def save() -> None:
        engine.begin_saves([Save(0, slots, ids, time.monotonic() + 60)])
        wait()

    piece = PER_CHUNK * PAGE  # a layer of a chunk
    pairs = [
        (
            cache.ctypes.data + (layer * MOVED + chunk) * piece,
            arena.data.ctypes.data + (chunk * LAYERS + layer) * piece,
        )
        for chunk in range(MOVED)
        for layer in range(LAYERS)
    ]

    def copy(to_arena: bool) -> None:
        for in_cache, in_arena in pairs:
            to, source = (in_arena, in_cache) if to_arena else (in_cache, in_arena)
            ctypes.memmove(to, source, piece)

    def plain(thread: ThreadPoolExecutor, to_arena: bool) -> None:
        done = thread.submit(copy, to_arena)
        while not done.done():
            time.sleep(LOOK_SECONDS)

    with ThreadPoolExecutor(1) as thread:
        rows = [
            _compare("load", load, lambda: plain(thread, False), len(cache)),
            _compare("save", save, lambda: plain(thread, True), len(cache)),
        ]
    engine.close()
    return rows


class _IdleDevice(HostDevice):
    """Takes everything and does nothing."""

    def copy(self, *_: Any, **__: Any) -> None:
        pass

    def gather(self, *_: Any) -> None:
        pass


def _memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """Touched memory from the start of a page on, as engines' caches and arenas are."""
    memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory[:] = 1
    return memory


def _layout(blocks: int, per_chunk: int, page: int) -> ChunkLayout:
    runs = tuple(Run(layer * blocks * page, page, page) for layer in range(LAYERS))
    return ChunkLayout(runs, per_chunk, blocks)


def _compare(name: str, ours: Callable[[], None], theirs: Callable[[], None], nbytes: int) -> Row:
    samples: tuple[list[float], list[float]] = ([], [])
    ours()
    theirs()
    for step in range(COPY_ROUNDS):
        # Each other time the other one goes first.
        for which, copy in [(0, ours), (1, theirs)][:: 1 if step % 2 else -1]:
            began = time.process_time()
            copy()
            samples[which].append(time.process_time() - began)
    mine, plain = median(samples[0]), median(samples[1])
    ratio = median(theirs / ours for ours, theirs in zip(*samples, strict=True))
    return {
        "name": f"{name}: {MOVED} chunks of {nbytes // MOVED >> 20} MiB",
        "value": round(nbytes / mine / 1e9, 2),
        "unit": "GB/s",
        "floor": round(nbytes / plain / 1e9 * COPY_GOAL, 2),
        "ratio": round(ratio, 3),
    }


if __name__ == "__main__":
    show(rows_of(run()))
