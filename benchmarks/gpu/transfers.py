"""Load and save through the arena, all of it: plan, ring, kernels, copies over the link.

Compared with the plain registered copy of the same direction. Chunks are those of Llama 3.1 8B, 256
tokens and 32 MiB each. Before its figures count, each engine has to bring its bytes round.

    chunks    1 to 64 of them, blocks scattered over the cache: the ring
    layouts   every KVCacheLayout
    joined    neighbouring blocks, as a fresh cache gives them: long plain copies
    pages     scattered pages of 4 KiB to 1 MiB, by the ring and by plain copies, and from which
              size on the ring is not worth it: what LMKV_DIRECT_COPY_BYTES should be here
    both      a load and a save at the same time
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import numpy as np

from benchmarks.gpu.copies import Floors
from benchmarks.gpu.machine import Machine
from benchmarks.table import Row
from lmkv_ray.arena import ArenaReader, ArenaWriter, this_process
from lmkv_ray.config import Settings
from lmkv_ray.layout import ChunkLayout
from lmkv_ray.transfer import Load, Save
from lmkv_ray.transfer.device_engine import DeviceEngine
from tests.kernels.caches import LAYOUTS, Shape

COUNTS = [1, 2, 8, 64]
LLAMA_8B = {"L": 32, "H": 8, "N": 16, "C": 256}
PAGES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20]
BLOCKS = 16
REPEATS = 5
RING_BYTES = int(Settings.model_fields["gpu_ring_bytes"].default)
ALWAYS_RING, ALWAYS_PLAIN = 1 << 60, 0
"""``direct_bytes`` of the two ways."""
DIRECT_BYTES = int(Settings.model_fields["direct_copy_bytes"].default)
AS_GOOD = 0.99
"""Plain copies that reach so much of the ring's speed are preferred: they need no kernel."""
SECONDS = 120.0
POLL_SECONDS = 50e-6
NO_PADDING = (0, 0, 0, 0, 0)

Rates = tuple[float, float]
"""Of loads and of saves."""


class Bench:
    """One engine over one cache, and an arena with twice the chunks that are moved."""

    def __init__(
        self, machine: Machine, layout: ChunkLayout, count: int, *, scattered: bool, direct: int
    ) -> None:
        self.nbytes = count * layout.chunk_bytes
        extent_bytes = max(64 << 20, layout.chunk_bytes)
        self._writer = ArenaWriter.create(
            "bench_gpu", 2 * self.nbytes + 2 * extent_bytes, extent_bytes=extent_bytes
        )
        per_extent = extent_bytes // layout.chunk_bytes
        slots = np.concatenate(
            [
                self._writer.assign_extent(extent, layout.chunk_bytes)
                for extent in range(-(-2 * count // per_extent))
            ]
        )
        keys = np.random.default_rng(0).integers(0, 2**64, (len(slots), 2), dtype=np.uint64)
        self._writer.reserve(slots, this_process())
        self._writer.publish(slots, keys, layout.chunk_bytes, 1)
        self._reader = ArenaReader.attach(self._writer.path)
        cache_bytes = max(
            run.offset + (layout.num_blocks - 1) * run.stride + run.nbytes for run in layout.runs
        )
        self._cache = machine.memory(cache_bytes)
        self.engine = DeviceEngine(
            [layout],
            machine.device(),
            cache=self._cache.address,
            cache_bytes=cache_bytes,
            ring_bytes=RING_BYTES,
            direct_bytes=direct,
        )
        self.engine.attach(self._reader, [0])
        self._keys = keys[:count]
        self._slots, self._other_slots = slots[:count], slots[count : 2 * count]
        order = np.arange(layout.num_blocks, dtype=np.int64)
        if scattered:
            order = np.random.default_rng(0).permutation(order)
        blocks = count * BLOCKS
        self._blocks, self._other_blocks = order[:blocks], order[blocks : 2 * blocks]
        self._layout = layout
        self._wait_registered()
        self._check(machine)

    def load(self, *, other: bool = False) -> Load:
        """All chunks into blocks."""
        hits = self._reader.lookup(self._keys)
        blocks = self._other_blocks if other else self._blocks
        return Load(self._reader.arena_id, hits.slots, hits.generations, blocks)

    def save(self, *, other: bool = False) -> Save:
        """Blocks into all chunks."""
        slots = (self._other_slots if other else self._slots).astype(np.int64)
        blocks = self._other_blocks if other else self._blocks
        return Save(self._reader.arena_id, slots, blocks, time.monotonic() + SECONDS)

    def seconds(self, *copies: Load | Save) -> float:
        """Until all have ended; copies in different directions go at the same time."""
        loads = [copy for copy in copies if isinstance(copy, Load)]
        saves = [copy for copy in copies if isinstance(copy, Save)]
        began, left = time.perf_counter(), len(copies)
        self.engine.begin_saves(saves)
        self.engine.begin_loads(loads, idle=False)
        while left:
            for ended in self.engine.ended():
                left -= 1
                if not ended.ok:
                    raise RuntimeError("the transfer engine reported a copy that is not good")
            time.sleep(POLL_SECONDS)  # as a worker's thread looks away, too
            if time.perf_counter() - began > SECONDS:
                raise TimeoutError(f"a copy has not ended after {SECONDS:.0f} s")
        return time.perf_counter() - began

    def close(self) -> None:
        """End the engine, free the arena."""
        self.engine.close()
        self._reader.close()
        self._writer.close()

    def _wait_registered(self) -> None:
        slots = np.concatenate([self._slots, self._other_slots])
        offsets = self._reader.offsets(slots, self._layout.chunk_bytes)
        deadline = time.monotonic() + SECONDS
        while not self.engine._registration.covers(self._reader, offsets).all():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the arena was not registered within {SECONDS:.0f} s")
            time.sleep(0.01)

    def _check(self, machine: Machine) -> None:
        """Random bytes: blocks, chunks, other blocks, other chunks; then both must be the same."""
        random = np.random.default_rng(1)
        first, again = (
            self._reader.data[at : at + self._layout.chunk_bytes]
            for at in self._reader.offsets(
                np.array([self._slots[0], self._other_slots[0]]), self._layout.chunk_bytes
            )
        )
        first[:] = random.integers(0, 256, len(first), np.uint8)
        expected = first.copy()
        self.seconds(self.load())
        first[:] = 0
        self.seconds(self.save())
        if not np.array_equal(first, expected):
            raise RuntimeError("bytes changed between a load and a save of the same blocks")
        self.seconds(self.load(other=True))
        self.seconds(self.save(other=True))
        if not np.array_equal(again, expected):
            raise RuntimeError("bytes changed on their way through other blocks")


def run(machine: Machine, floors: Floors) -> list[Row]:
    """Rows of all five."""
    rows = []
    chunk = _layout("LBHNC", LLAMA_8B, 1).chunk_bytes
    counts = [count for count in COUNTS if count * chunk <= 16 * machine.scale] or [1]
    for count in counts:
        name = f"{count} x {chunk >> 20} MiB, LBHNC, scattered"
        rows += _both_ways(machine, floors, name, _layout("LBHNC", LLAMA_8B, count), count)
    count = min(8, counts[-1])
    for name in LAYOUTS[1:]:
        layout = _layout(name, LLAMA_8B, count)
        rows += _both_ways(machine, floors, f"{count} chunks, {name}, scattered", layout, count)
    layout = _layout("LBHNC", LLAMA_8B, count)
    name = f"{count} chunks, LBHNC, joined"
    rows += _both_ways(machine, floors, name, layout, count, scattered=False)
    rates: dict[int, list[Rates]] = {}
    for page in (page for page in PAGES if 32 * BLOCKS * page <= 16 * machine.scale):
        sizes = {"L": 32, "H": 1, "N": 1, "C": page // 2}
        many = max(1, min(256, 4 * machine.scale // (32 * BLOCKS * page)))
        for way, direct in (("ring", ALWAYS_RING), ("plain copies", ALWAYS_PLAIN)):
            name = f"pages of {page >> 10} KiB, {way}"
            layout = _layout("LBNHC", sizes, many)
            both = _both_ways(machine, floors, name, layout, many, direct=direct)
            rates.setdefault(page, []).append((both[0].value, both[1].value))
            rows += both
    rows.append(_break_even_row({page: (ring, plain) for page, (ring, plain) in rates.items()}))
    with _bench(machine, _layout("LBHNC", LLAMA_8B, count), count) as bench:
        taken = _median(lambda: bench.seconds(bench.load(), bench.save(other=True)))
    link = floors.to_device + floors.from_device
    rows.append(_row("load and save at the same time", 2 * bench.nbytes / taken, link))
    return rows


def break_even(rates: Mapping[int, tuple[Rates, Rates]]) -> int:
    """The page size from which on plain copies are as good as the ring, both ways.

    Args:
        rates: by page size those of the ring and of plain copies.

    Returns:
        bytes; twice the largest page if the ring is better even there.
    """
    best = 2 * max(rates)
    for page in sorted(rates, reverse=True):
        ring, plain = rates[page]
        if any(p < AS_GOOD * r for r, p in zip(ring, plain, strict=True)):
            break
        best = page
    return best


def _break_even_row(rates: Mapping[int, tuple[Rates, Rates]]) -> Row:
    found = break_even(rates)
    name = "break-even of ring and plain copies: LMKV_DIRECT_COPY_BYTES, over the default"
    return Row(name, found >> 10, "KiB", DIRECT_BYTES >> 10, found / DIRECT_BYTES)


def _both_ways(
    machine: Machine,
    floors: Floors,
    name: str,
    layout: ChunkLayout,
    count: int,
    *,
    scattered: bool = True,
    direct: int = DIRECT_BYTES,
) -> list[Row]:
    with _bench(machine, layout, count, scattered=scattered, direct=direct) as bench:
        load = bench.nbytes / _median(lambda: bench.seconds(bench.load()))
        save = bench.nbytes / _median(lambda: bench.seconds(bench.save()))
    return [
        _row(f"load {name}", load, floors.to_device),
        _row(f"save {name}", save, floors.from_device),
    ]


@contextmanager
def _bench(
    machine: Machine,
    layout: ChunkLayout,
    count: int,
    *,
    scattered: bool = True,
    direct: int = DIRECT_BYTES,
) -> Iterator[Bench]:
    bench = Bench(machine, layout, count, scattered=scattered, direct=direct)
    try:
        yield bench
    finally:
        bench.close()


def _median(action: Callable[[], float]) -> float:
    return median(action() for _ in range(REPEATS))


def _layout(name: str, sizes: dict[str, int], count: int) -> ChunkLayout:
    blocks = 2 * count * BLOCKS
    return Shape(name, {**sizes, "B": blocks}, 2, NO_PADDING).chunk_layout(BLOCKS)


def _row(name: str, value: float, floor: float) -> Row:
    return Row(name, value / 1e9, "GB/s", floor / 1e9, value / floor)
