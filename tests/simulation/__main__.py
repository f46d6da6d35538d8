"""Simulate seeds, with one process for each core.

python -m tests.simulation --seeds 0:100 [--mutation NAME] [--story] [--processes N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.simulation import mutations

if TYPE_CHECKING:
    from tests.simulation.run import Result


def simulate(seed: int) -> Result:
    """One seed. Imported late: a mutation changes a module before."""
    from tests.simulation.run import run

    return run(seed)


def results(seeds: range, mutation: str | None, processes: int) -> Iterator[Result]:
    """The results of seeds, in the order in which they end."""
    if mutation is not None:
        mutations.apply(mutation)
    if processes == 1:
        yield from map(simulate, seeds)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(simulate, seeds)


def main() -> int:
    """Simulate seeds; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", default="0:100", help="one seed, or FIRST:END")
    parser.add_argument(
        "--mutation", help="a bug of tests/simulation/mutations.py; stops when found"
    )
    parser.add_argument("--story", action="store_true", help="print what happened")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    first, _, end = arguments.seeds.partition(":")
    seeds = range(int(first), int(end) if end else int(first) + 1)
    processes = 1 if arguments.mutation else min(arguments.processes, len(seeds))
    began, hours, core_seconds, ended, failed = time.perf_counter(), 0.0, 0.0, 0, 0
    for result in results(seeds, arguments.mutation, processes):
        ended += 1
        hours += result.node_seconds / 3600
        core_seconds += result.seconds
        if arguments.story:
            print(result.story)
        if result.violation is not None:
            failed += 1
            print(f"seed {result.seed}: {result.violation}", flush=True)
            if arguments.mutation:
                break
        if ended % 500 == 0:
            print(f"{ended} seeds have ended, {failed} of them failed", flush=True)
    print(
        f"{failed} of {ended} seeds failed in {time.perf_counter() - began:.1f} s; {hours:.2f} "
        f"simulated node-hours, {hours / core_seconds * 3600:.0f} for one hour of one core"
    )
    return min(failed, 1)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of bytes are in another order each time
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main())
