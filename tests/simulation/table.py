"""How soon the simulation finds each known bug: a table, and benchmarks/results/simulation.json."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.simulation.mutations import MUTATIONS, Mutation

SEEDS = 200
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "simulation.json"
FOUND = re.compile(r"seed (\d+): (.*)")


Row = dict[str, str | int | float | None]


def search(mutation: Mutation) -> Row:
    """How soon one mutation is found."""
    began = time.perf_counter()
    command = ["-m", "tests.simulation", "--mutation", mutation.name, "--seeds", f"0:{SEEDS}"]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    found = FOUND.search(result.stdout)
    print(f"{mutation.name}: {found[0] if found else 'not found'}", flush=True)
    return {
        "mutation": mutation.name,
        "breaks": mutation.what,
        "seeds": int(found[1]) + 1 if found else None,
        "seconds": round(time.perf_counter() - began, 1),
        "violation": found[2] if found else None,
    }


def main() -> int:
    """Search for every mutation, one on each core; the number of those that were not found."""
    rows: list[Row] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for search_ended in as_completed([pool.submit(search, one) for one in MUTATIONS]):
            rows.append(search_ended.result())
            RESULTS.write_text(json.dumps({"seeds": SEEDS, "rows": rows}, indent=1) + "\n")
    table = Table("mutation", "seeds", "seconds", "found by")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("mutation", "seeds", "seconds", "violation")))
    Console(width=120).print(table)
    return sum(row["seeds"] is None for row in rows)


if __name__ == "__main__":
    sys.exit(main())
