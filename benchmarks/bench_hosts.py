"""Fetches between hosts made of namespaces: round trips, and bandwidth from several peers at once.

    python -m benchmarks.bench_hosts    as root; writes build/hosts.json

The network is a program (tests/hosts) that delays what it forwards. So one peer's stream is bound
by the delay, as over a long line, and all of them together by what this machine can forward.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.table import Row, show, write
from tests.faults.lab import CHUNK_BYTES, Lab
from tests.hosts import Path as Cable

OUTPUT = Path("build/hosts.json")
PEERS = 3
CAPACITY = 512 << 20
CHUNKS = 32
"""Of a document."""
ROUND_TRIP = 0.1
ROUNDS = 5
WARM_UP = 5
"""Fetches until TCP has learnt how much may be under way on such a line."""


def run() -> list[Row]:
    """Round trips to the first chunk of one and of many, and GB/s from 1 to all peers."""
    lab = Lab(PEERS + 1, capacity=CAPACITY, stage_seconds=20.0)
    try:
        _fetch(lab, PEERS, CHUNKS)  # all know each other now
        lab.hosts.degrade(Cable(delay=ROUND_TRIP / 2))
        for _ in range(WARM_UP):
            _fetch(lab, PEERS, CHUNKS)
        firsts = [_fetch(lab, 1, 1)[0] for _ in range(ROUNDS)]
        taken = [[_fetch(lab, n, CHUNKS) for _ in range(ROUNDS)] for n in range(1, PEERS + 1)]
    finally:
        lab.close()
    rows = []
    for name, seconds in {
        "first chunk, one asked for": median(firsts),
        f"first chunk of {CHUNKS} of 512 KiB": median(first for first, _ in taken[0]),
    }.items():
        trips = seconds / ROUND_TRIP
        rows.append(Row(name, trips, "round trips", 3.0, trips / 3.0))
    rates = [
        n * CHUNKS * CHUNK_BYTES / 1e9 / median(last for _, last in each)
        for n, each in enumerate(taken, 1)
    ]
    for n, rate in enumerate(rates, 1):
        rows.append(Row(f"{n} peers at once", rate, "GB/s", rates[0], rate / rates[0]))
    return rows


def _fetch(lab: Lab, peers: int, chunks: int) -> tuple[float, float]:
    """Let host 0 fetch a new document from each of some peers; seconds to first and last chunk."""
    numbers = [lab.new_document() for _ in range(peers)]
    for engine, number in zip(lab.engines[1:], numbers, strict=False):
        assert engine.call("save", number, chunks) == chunks
    for number in numbers:
        lab.eventually(partial(lab.engines[0].call, "known", number, chunks))
    first, last, present = lab.engines[0].call("gather", numbers, chunks)
    assert present == peers * chunks
    return first, last


if __name__ == "__main__":
    rows = run()
    show(rows)
    write(rows, OUTPUT)
    print(f"Written to {OUTPUT}.")
