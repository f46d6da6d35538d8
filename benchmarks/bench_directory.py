"""The directory's table: bytes per chunk, lookups, updates, and the time to rebuild it.

One process, one thread, no Ray: what the directory actor can do at most. Lookups run while other
work may share the machine, so rates are the median of several rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lmkv_ray.directory import DirectoryState
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import Delta

CHUNKS = 1_000_000
NODES = 8
RUN = 256
"""Chunks of one prompt."""
SECONDS = 0.5


def run() -> list[dict[str, Any]]:
    """Rows of name, value, unit, floor (the goal), and how many times better than it we are."""
    keys = np.random.default_rng(0).integers(0, 1 << 63, (CHUNKS, 2), dtype=np.uint64)
    directory = DirectoryState(CHUNKS)
    per_node = np.array_split(keys, NODES)
    snapshots = [_delta(i, 1, part, snapshot=True) for i, part in enumerate(per_node)]
    start = time.perf_counter()
    for delta in snapshots:
        directory.delta(delta, 0)
    rebuild = time.perf_counter() - start
    assert len(directory.table) == CHUNKS

    rng = np.random.default_rng(1)
    prompts = [keys[i : i + RUN] for i in rng.integers(0, CHUNKS - RUN, 512)]
    unknown = rng.integers(0, 1 << 63, (512, RUN, 2), dtype=np.uint64)
    hits = _rate(lambda i: directory.lookup(prompts[i % 512], "asking", 0, 0))
    misses = _rate(lambda i: directory.lookup(unknown[i % 512], "asking", 0, 0))
    batch = 512
    fresh = rng.integers(0, 1 << 63, (4096, batch, 2), dtype=np.uint64)
    updates = _rate(
        lambda i: directory.delta(
            _delta(0, i + 2, fresh[i % 4096], removed=fresh[(i - 1) % 4096]), 0
        )
    )
    bytes_per_chunk = directory.nbytes / CHUNKS
    return [
        _row("bytes per chunk", bytes_per_chunk, "B", 150, 150 / bytes_per_chunk),
        _row(f"lookups of {RUN} known keys", hits, "1/s", 2000, hits / 2000),
        _row(f"lookups of {RUN} unknown keys", misses, "1/s", 2000, misses / 2000),
        _row(
            "chunks added and removed", updates * batch * 2, "1/s", 100_000, updates * batch / 5e4
        ),
        _row("rebuild from snapshots", rebuild, "s per million", 5, 5 / rebuild),
    ]


def _row(name: str, value: float, unit: str, floor: float, ratio: float) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "floor": floor, "ratio": ratio}


def _delta(
    node: int, seq: int, added: KeyArray, *, removed: KeyArray | None = None, snapshot: bool = False
) -> Delta:
    return Delta(
        node_id=f"node-{node}",
        epoch=1,
        seq=seq,
        added=added.tobytes(),
        removed=b"" if removed is None else removed.tobytes(),
        begin=snapshot,
        end=snapshot,
    )


def _rate(call: Callable[[int], object], rounds: int = 5) -> float:
    """Calls per second, median of rounds."""
    rates, i = [], 0
    for _ in range(rounds):
        start, first = time.perf_counter(), i
        while time.perf_counter() - start < SECONDS / rounds:
            call(i)
            i += 1
        rates.append((i - first) / (time.perf_counter() - start))
    return statistics.median(rates)


if __name__ == "__main__":
    from rich.console import Console
    from rich.table import Table

    table = Table("directory", "value", "unit", "goal", "x goal")
    for row in run():
        cells = f"{row['value']:,.2f}", row["unit"], f"{row['floor']:,}", f"{row['ratio']:.1f}"
        table.add_row(row["name"], *cells)
    Console().print(table)
