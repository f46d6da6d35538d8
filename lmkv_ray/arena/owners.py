"""Processes that may write into reserved slots, and whether they still live."""

from __future__ import annotations

import os
from pathlib import Path

from lmkv_ray.messages import Owner


def this_process() -> Owner:
    """The calling process."""
    stat = _stat(os.getpid())
    assert stat is not None, "/proc has no entry for this process"
    return Owner(pid=os.getpid(), start=stat[1])


def is_alive(owner: Owner) -> bool:
    """Whether the process still runs. A zombie does not: it can write no more."""
    stat = _stat(owner.pid)
    return stat is not None and stat[0] not in "ZX" and stat[1] == owner.start


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter, and start time in clock ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses, which may contain anything.
    values = text.rpartition(")")[2].split()
    return values[0], int(values[19])
