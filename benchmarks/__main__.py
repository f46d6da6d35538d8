"""``make bench``: all figures, as a table and as build/bench.json."""

from __future__ import annotations

from pathlib import Path

from benchmarks import (
    bench_arena,
    bench_directory,
    bench_disk,
    bench_engine,
    bench_link,
    bench_transfer,
)
from benchmarks.table import rows_of, show, write

OUTPUT = Path("build/bench.json")

if __name__ == "__main__":
    rows = [
        *rows_of(bench_arena.run()),
        *rows_of(bench_directory.run()),
        *rows_of(bench_disk.run()),
        *rows_of(bench_transfer.run()),
        *bench_link.run(),
        *bench_engine.run(),
    ]
    show(rows)
    write(rows, OUTPUT)
    print(f"Written to {OUTPUT}.")
