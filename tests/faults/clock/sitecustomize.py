"""A wall clock that a test can turn: Python imports this at start if PYTHONPATH has its directory.

A kernel has one clock for all its namespaces, so the clock of one host can only be turned inside
its processes. The file CLOCK of a host holds the seconds that its clock is ahead.
"""

import time
from collections.abc import Callable

CLOCK = "/tmp/clock"

_seconds: Callable[[], float] = time.time
_nanoseconds: Callable[[], int] = time.time_ns


def _ahead() -> int:
    try:
        with open(CLOCK) as file:  # noqa: PTH123  (pathlib would be imported everywhere)
            return int(file.read() or 0)
    except OSError:
        return 0


time.time = lambda: _seconds() + _ahead()
time.time_ns = lambda: _nanoseconds() + _ahead() * 10**9
