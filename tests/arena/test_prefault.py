"""Faulting in: every page is in the process's map afterwards, unless it was told to stop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmkv_ray.arena.prefault import STEP_BYTES, prefault
from lmkv_ray.arena.segment import Segment

NBYTES = 3 * STEP_BYTES + 8192


@pytest.fixture
def memory(name: str) -> Iterator[np.ndarray]:
    segment = Segment.create(Path("/dev/shm"), name, NBYTES)
    segment.allocate(0, NBYTES)
    yield segment.map(writable=True)
    segment.close()


def resident(memory: np.ndarray) -> int:
    """Bytes of a mapping that this process has mapped pages for."""
    smaps = Path("/proc/self/smaps").read_text()
    [kib] = re.findall(rf"^{memory.ctypes.data:x}-.*?^Rss: +(\d+) kB", smaps, re.M | re.S)
    return int(kib) << 10


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_every_page_is_mapped(memory: np.ndarray, threads: int | None) -> None:
    assert resident(memory) == 0
    prefault(memory, threads=threads)
    assert resident(memory) == NBYTES
    assert not memory.any()


def test_it_stops(memory: np.ndarray) -> None:
    asked = iter([False, True])
    prefault(memory, threads=1, stop=lambda: next(asked, True))
    assert resident(memory) == STEP_BYTES
