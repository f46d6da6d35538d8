"""``make bench-gpu``: all figures of the GPU data path, as a table, as JSON and as a plot.

Without a GPU it says so, and runs everything it can on the host: the same code, no figures to keep.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import copies, machine, packing, plot, transfers, ttft
from benchmarks.table import Outcome, Row, show

OUTPUT = Path("build")

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if everything ran that can run here, 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--no-engines", action="store_true", help="leave out vLLM (minutes)")
    chosen = parser.parse_args(arguments)
    where, why_not = machine.find()
    print(f"Measured on: {where.name}." + (f" {why_not}" if why_not else ""), flush=True)
    rows, floors = copies.run(where)
    parts: dict[str, Callable[[], Outcome]] = {
        "packing": lambda: Outcome(packing.run(where, floors), [], []),
        "transfers": lambda: Outcome(transfers.run(where, floors), [], []),
    }
    if not chosen.no_engines:
        parts["engines"] = lambda: ttft.run(floors, gpu=not why_not)
    absent: list[str] = []
    failed: list[str] = []
    for name, run in parts.items():
        try:
            outcome = run()
        except Exception as error:  # what follows can still be measured
            logger.exception("%s failed", name)
            outcome = Outcome([], [], [f"{name}: {error}"])
        rows += outcome.rows
        absent += outcome.absent
        failed += outcome.failed
    not_measured = absent + failed
    show(rows)
    for line in not_measured:
        print(f"Not measured: {line}")
    written = write(rows, not_measured, where.name, why_not, chosen.out)
    print(f"Written to {' and '.join(map(str, written))}.")
    if why_not:
        print("There is no GPU here: these figures prove that the benchmark runs, nothing else.")
    return 1 if failed else 0


def write(
    rows: list[Row], not_measured: list[str], device: str, without_gpu: str, out: Path
) -> list[Path]:
    """The JSON file and the plot."""
    out.mkdir(parents=True, exist_ok=True)
    data, picture = out / "bench-gpu.json", out / "bench-gpu.png"
    content = {
        "device": device,
        "without_gpu": without_gpu,
        "not_measured": not_measured,
        "rows": [row._asdict() for row in rows],
    }
    data.write_text(json.dumps(content, indent=1) + "\n")
    plot.draw(rows, device, picture)
    return [data, picture]


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.exit(main())
