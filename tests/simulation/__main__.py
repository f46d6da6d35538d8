"""python -m tests.simulation --seeds 0:100 [--story]"""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.run import run


def main() -> int:
    """Simulate seeds; the number of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", default="0:100", help="one seed, or FIRST:END")
    parser.add_argument("--story", action="store_true", help="print what happened")
    arguments = parser.parse_args()
    first, _, end = arguments.seeds.partition(":")
    began, hours, failed = time.perf_counter(), 0.0, 0
    for seed in range(int(first), int(end) if end else int(first) + 1):
        result = run(seed)
        hours += result.node_seconds / 3600
        if arguments.story:
            print(result.story)
        if result.violation is not None:
            failed += 1
            print(f"seed {seed}: {result.violation}")
    seconds = time.perf_counter() - began
    print(
        f"{failed} failed; {hours:.2f} simulated node-hours in {seconds:.1f} s: "
        f"{hours / seconds * 3600:.0f} in one hour"
    )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
