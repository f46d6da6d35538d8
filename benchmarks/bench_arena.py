"""How fast the arena answers and moves bytes.

    lookup     512 keys in an arena of 100,000 chunks; microseconds, at most 200
    copy in    up to 128 chunks into their slots, against the same copies between ordinary buffers
    copy out   up to 128 chunks out of their slots, with lookup and validation, against the same

Copies and their comparison are interleaved and summed up by medians, so that a noisy machine
disturbs both alike. Run as ``python -m benchmarks.bench_arena``.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from lmkv_ray.arena import ArenaReader, ArenaWriter, this_process

LOOKUP_KEYS = 512
CHUNKS = 100_000
LOOKUP_GOAL_US = 200.0
COPY_GOAL = 0.9
COPY_SIZES = [64 << 10, 1 << 20, 8 << 20, 32 << 20]
COPY_TOTAL = 256 << 20
"""Bytes in the buffers that copies walk through, more than the last-level cache."""

Row = dict[str, Any]


def run() -> list[Row]:
    """All figures, as rows {name, value, unit, floor, ratio}.

    ``ratio`` is floor / value for times, and ours / plain (0.9 or more is good) for copies.
    """
    return [*lookups(), *(row for size in COPY_SIZES for row in copies(size))]


def lookups() -> list[Row]:
    """Latency of a lookup in a well-filled arena, of keys that are there and that are not."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, (CHUNKS, 2), dtype=np.uint64)
    writer = ArenaWriter.create("bench", 2 << 30)
    per_extent = writer.geometry.slots_per_extent
    extents = range(-(-CHUNKS // per_extent))
    size = writer.geometry.min_slot_bytes
    slots = np.concatenate([writer.assign_extent(e, size) for e in extents])[:CHUNKS]
    writer.reserve(slots, this_process())
    writer.publish(slots, keys, size, 1)
    reader = ArenaReader.attach(writer.path)
    absent = rng.integers(0, 2**64, (CHUNKS, 2), dtype=np.uint64)
    rows = []
    for name, pool in (("present", keys), ("absent", absent)):
        samples = []
        for _ in range(1_000):
            wanted = pool[rng.integers(0, CHUNKS, LOOKUP_KEYS)]
            samples.append(_seconds(lambda wanted=wanted: reader.lookup(wanted)))  # type: ignore[misc]
        value = median(samples) * 1e6
        rows.append(
            {
                "name": f"look up {LOOKUP_KEYS} {name} keys of {CHUNKS}",
                "value": round(value, 1),
                "unit": "us",
                "floor": LOOKUP_GOAL_US,
                "ratio": round(LOOKUP_GOAL_US / value, 2),
            }
        )
    writer.close()
    reader.close()
    return rows


def copies(size: int) -> list[Row]:
    """Speed of copies into and out of slots of ``size``, relative to plain copies."""
    count = max(COPY_TOTAL // size, 4)
    writer = ArenaWriter.create("bench", 2 * COPY_TOTAL, extent_bytes=64 << 20)
    per_extent = (64 << 20) // size
    extents = range(-(-count // per_extent))
    slots = np.concatenate([writer.assign_extent(e, size) for e in extents])[:count]
    keys = np.random.default_rng(1).integers(0, 2**64, (count, 2), dtype=np.uint64)
    reader = ArenaReader.attach(writer.path)
    list(reader.populate())
    writer.reserve(slots, this_process())

    local, ordinary = _buffer(count, size), _buffer(count, size)
    batch = min(count // 4, 128)

    def copy_in(first: int) -> None:
        for i, at in enumerate(reader.offsets(slots[first : first + batch], size).tolist(), first):
            reader.data[at : at + size] = local[i]

    def copy_out(first: int) -> None:
        """As a worker does, who is told slots and generations."""
        mine = slice(first, first + batch)
        for i, at in enumerate(reader.offsets(slots[mine], size).tolist(), first):
            local[i] = reader.data[at : at + size]
        assert reader.unchanged(slots[mine], generations[mine]).all()

    def plain(first: int) -> None:
        for i in range(first, first + batch):
            ordinary[i] = local[i]

    def plain_back(first: int) -> None:
        for i in range(first, first + batch):
            local[i] = ordinary[i]

    name = f"{batch} chunks of {size >> 10} KiB"
    rows = [_compare(f"copy in {name}", copy_in, plain, count, batch, size)]
    writer.publish(slots, keys, size, 1)
    generations = reader.lookup(keys).generations
    rows.append(_compare(f"copy out {name}", copy_out, plain_back, count, batch, size))
    writer.close()
    reader.close()
    return rows


def _buffer(count: int, size: int) -> npt.NDArray[np.uint8]:
    """Ordinary memory, aligned as an engine's cache is.

    NumPy's own is 16 bytes past a page: copies from a page's start to there run at a tenth of the
    speed on this CPU (stores and the next loads look alike in their low 12 bits), which would say
    nothing about the arena.
    """
    buffer = np.frombuffer(mmap.mmap(-1, count * size), np.uint8).reshape(count, size)
    buffer[:] = 1
    return buffer


def _compare(
    name: str,
    ours: Callable[[int], None],
    theirs: Callable[[int], None],
    count: int,
    batch: int,
    size: int,
) -> Row:
    batches = count // batch
    for i in range(batches):
        ours(i * batch)
        theirs(i * batch)
    samples: tuple[list[float], list[float]] = ([], [])
    for step in range(max(3 * batches, 60)):
        # Each other time the other one goes first, and they touch memory of different chunks.
        mine, plain = step % batches, (step + batches // 2) % batches
        pair = [(0, ours, mine * batch), (1, theirs, plain * batch)]
        for which, copy, at in pair[:: 1 if step % 2 else -1]:
            samples[which].append(_seconds(lambda copy=copy, at=at: copy(at)))  # type: ignore[misc]
    our_seconds, plain_seconds = median(samples[0]), median(samples[1])
    return {
        "name": name,
        "value": round(batch * size / our_seconds / 1e9, 2),
        "unit": "GB/s",
        "floor": round(batch * size / plain_seconds / 1e9 * COPY_GOAL, 2),
        "ratio": round(plain_seconds / our_seconds, 3),
    }


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    table = Table("figure", "value", "unit", "floor", "ratio")
    for row in run():
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
