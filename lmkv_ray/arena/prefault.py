"""Faulting in memory of an arena on several threads, before copies need it.

Each process has to enter each page into its own memory map, and the process that touches a page
first has to zero it besides: half a second to two seconds a GiB on one thread. The threads give way
to others: half of the processors at most, at a lower priority. Steps are small, as each holds the
process's memory map, for which other threads may have to wait.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena.segment import populate

STEP_BYTES = 4 << 20
MOST_THREADS = 4
NICE = 5
"""A third of the weight of a thread that is not nice: low, but not so low that a thread holding the
memory map is kept waiting while others wait for it."""


def prefault(
    memory: npt.NDArray[np.uint8],
    *,
    threads: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Fault in all pages of allocated memory; returns when that is done.

    Args:
        memory: part of a mapping, from the start of a page on.
        threads: default: half of the processors, at most 4.
        stop: asked now and then whether to leave the rest.
    """
    threads = threads or min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))

    def touch(start: int) -> None:
        if not stop():
            populate(memory[start : start + STEP_BYTES], writable=True)

    steps = range(0, memory.nbytes, STEP_BYTES)
    try:
        with ThreadPoolExecutor(threads, "lmkv-prefault", initializer=_give_way) as pool:
            list(pool.map(touch, steps))
    except RuntimeError:  # no thread can be started: a limit on processes
        for step in steps:
            touch(step)


def _give_way() -> None:
    with contextlib.suppress(OSError):  # not worth more
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
