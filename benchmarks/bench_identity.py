"""What it takes to know an engine's weights: the first start reads all files, the next ones none.

    first    bytes a second of SHA-256 over files in memory, on the threads an engine uses, beside
             one plain read of them by one thread
    again    seconds until the same files are known from the memory of digests

Run as ``python -m benchmarks.bench_identity [--gigabytes 4] [--output FILE]``. The files, of 1 GiB
each, are made in a temporary directory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.table import Row, show, write
from lmkv_ray.identity import DigestMemory, FileDigests

PIECE = 64 << 20


def run(gigabytes: int) -> list[Row]:
    """Rows of both."""
    with tempfile.TemporaryDirectory() as directory:
        files = [_made(Path(directory) / f"{i}.safetensors") for i in range(gigabytes)]
        memory = DigestMemory(Path(directory) / "digests")
        # A file that has just changed is not remembered: it could change again unseen.
        later = time.time() + 60
        plain = _seconds(lambda: [_read(file) for file in files])
        first = _seconds(lambda: FileDigests(memory, now=lambda: later).of(files))
        again = _seconds(lambda: FileDigests(memory, now=lambda: later).of(files))
    return [
        Row(
            f"first start, {gigabytes} GiB",
            gigabytes / first,
            "GiB/s",
            gigabytes / plain,
            plain / first,
        ),
        Row("next start, the same files", 1e3 * again, "ms", 1e3 * first, again / first),
    ]


def _made(path: Path) -> Path:
    piece = os.urandom(PIECE)
    with path.open("wb") as file:
        for _ in range((1 << 30) // PIECE):
            file.write(piece)
    return path


def _read(path: Path) -> int:
    buffer, size = bytearray(4 << 20), 0
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            size += n
    return size


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--gigabytes", type=int, default=4)
    arguments.add_argument("--output", type=Path)
    given = arguments.parse_args()
    rows = run(given.gigabytes)
    show(rows)
    if given.output:
        write(rows, given.output)
