"""A directory as it grows: a thousand nodes, millions of chunks, without Ray and without sleeping.

    python -m benchmarks.bench_directory_scale --chunks 3000000
    python -m benchmarks.bench_directory_scale --chunks 30000000   # about 4 GB of memory, minutes

Every node's content is told in pieces, as shards do; one chunk in eight is on two nodes. At each
step of growth this measures: a lookup of 256 chunks of one prompt, a delta of 64 chunks in and 64
out, a heartbeat, the slowest of a thousand messages, a lost node, and bytes per chunk.
``--plot FILE`` draws them over the number of chunks.

All times are of the processor: a part of the directory is one thread, and other work may share
the machine. Keys are made by counting and mixing, so that nobody has to keep them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.table import Row, show, write
from lmkv_ray.directory import DirectoryState
from lmkv_ray.directory.table import SWEEP
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import Delta, decode, encode
from lmkv_ray.shard.deltas import PIECE

NODES = 1000
RUN = 256
"""Chunks of one prompt."""
BATCH = 64
"""Chunks that one delta adds, and removes."""
STEPS = 10
SAMPLES = 300


class Simulation:
    """One part of a directory, and what a thousand nodes tell it."""

    def __init__(self, chunks: int) -> None:
        self.per_node = -(-chunks // NODES)
        self.state = DirectoryState(int(chunks * 1.02))
        self.seq = [0] * NODES
        self.told = 0  # chunks per node
        self.took: list[float] = []  # seconds of each message
        self.rng = np.random.default_rng(0)

    def content(self, node: int, first: int, last: int) -> KeyArray:
        """Keys of a node's chunks ``first`` to ``last``; an eighth is the next node's too."""
        serial = np.arange(first, last, dtype=np.uint64)
        owner = (node + (serial % np.uint64(8) == 0)) % NODES
        return _mix(owner.astype(np.uint64) * np.uint64(1 << 32) + serial)

    def grow(self, per_node: int) -> float:
        """All nodes tell more chunks; returns seconds per million."""
        before = time.thread_time()
        added = 0
        for node in range(NODES):
            for first in range(self.told, per_node, PIECE):
                last = min(first + PIECE, per_node)
                self.tell(node, self.content(node, first, last), begin=first == 0)
                added += last - first
        self.told = per_node
        return 1e6 * (time.thread_time() - before) / max(added, 1)

    def tell(
        self, node: int, added: KeyArray, removed: bytes = b"", *, begin: bool = False
    ) -> None:
        self.seq[node] += 1
        message = encode(
            Delta(
                node_id=f"node-{node}",
                epoch=1,
                seq=self.seq[node],
                added=added.tobytes(),
                removed=removed,
                begin=begin,
                end=begin,
            )
        )
        start = time.thread_time()
        reply = self.state.delta(decode(message, Delta), 0)
        encode(reply)
        self.took.append(time.thread_time() - start)
        assert not reply.resync

    def lookup(self) -> None:
        node = int(self.rng.integers(NODES))
        first = int(self.rng.integers(max(self.told - RUN, 1)))
        found = self.state.lookup(self.content(node, first, first + RUN), "asking", 0, 0)
        assert found

    def update(self) -> None:
        node = int(self.rng.integers(NODES))
        fresh = _mix(self.rng.integers(1 << 62, 1 << 63, BATCH, dtype=np.uint64))
        self.tell(node, fresh)
        self.tell(node, fresh[:0], removed=fresh.tobytes())

    def heartbeat(self) -> None:
        self.tell(int(self.rng.integers(NODES)), np.empty((0, 2), np.uint64))


def measure(chunks: int) -> dict[str, list[float]]:
    """Each figure at each step of growth."""
    simulation = Simulation(chunks)
    figures: dict[str, list[float]] = {}
    for step in range(1, STEPS + 1):
        fill = simulation.grow(simulation.per_node * step // STEPS)
        for name, value in {
            "chunks": simulation.told * NODES,
            "told, s per million": fill,
            f"lookup of {RUN} chunks, us": 1e6 * _seconds(simulation.lookup),
            f"delta of {BATCH} chunks, us": 1e6 * _seconds(simulation.update) / 2,
            "heartbeat, us": 1e6 * _seconds(simulation.heartbeat),
        }.items():
            figures.setdefault(name, []).append(value)
    start = time.thread_time()
    simulation.state.node_lost("node-1")
    figures["node lost, ms"] = [1e3 * (time.thread_time() - start)]
    for _ in range(2 * simulation.state.table.capacity // SWEEP + 2):
        simulation.tell(0, np.empty((0, 2), np.uint64))
    slow = np.quantile(simulation.took, 0.999)
    figures["slowest of 1,000 messages, ms"] = [1e3 * float(slow)]
    figures["bytes per chunk"] = [simulation.state.nbytes / len(simulation.state.table)]
    figures["peak memory, GB"] = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]
    return figures


def rows(figures: dict[str, list[float]]) -> list[Row]:
    """Figures at full size, over those of the first step."""
    found = []
    for name, values in figures.items():
        unit = name.rpartition(", ")[2] if ", " in name else ""
        found.append(Row(f"directory: {name}", values[-1], unit, values[0], values[-1] / values[0]))
    return found


def plot(figures: dict[str, list[float]], file: Path) -> None:
    """Cost per lookup and per update as the directory grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in figures.items():
        if name.endswith(", us"):
            axes.plot(np.array(figures["chunks"]) / 1e6, values, marker="o", label=name[:-4])
    axes.set(
        xlabel="million chunks, on 1,000 nodes",
        ylabel="microseconds",
        ylim=(0, None),
        title="One part of the directory as it grows",
    )
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _seconds(call: Callable[[], None]) -> float:
    """Median of many calls."""
    took = []
    for _ in range(SAMPLES):
        start = time.thread_time()
        call()
        took.append(time.thread_time() - start)
    return statistics.median(took)


def _mix(numbers: np.ndarray) -> KeyArray:
    """Random-looking keys from numbers (splitmix64, Steele et al. 2014)."""
    z = numbers.astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.stack([z, z * np.uint64(0x9E3779B97F4A7C15)], axis=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--chunks", type=int, default=3_000_000)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path, help="JSON rows")
    arguments = parser.parse_args()
    measured = measure(arguments.chunks)
    show(rows(measured))
    if arguments.plot:
        plot(measured, arguments.plot)
    if arguments.output:
        write(rows(measured), arguments.output)
