"""Reads out of bounds are seen by AddressSanitizer, which also sees that it would see them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmkv_ray.kernels import PageTable
from lmkv_ray.layout import ChunkLayout, Run
from tests.kernels.backends import Copy, HostBackend, empty_targets

ROOT = Path(__file__).parents[2]


def copy_everything(beyond: int) -> None:
    """Gather and scatter of exactly fitting memories; ``beyond`` corrupts a table on its way."""
    backend = HostBackend("-fsanitize=address", "-g")
    for nbytes in (1024, 1040, 1000, 514, 37):
        layout = ChunkLayout((Run(0, 2 * nbytes, nbytes), Run(nbytes, 2 * nbytes, nbytes)), 2, 3)
        cache = np.zeros(6 * nbytes, np.uint8)
        buffer = np.zeros(layout.chunk_bytes, np.uint8)
        targets, ints = empty_targets(2), np.arange(2, dtype=np.int64)
        table = PageTable(layout, cache_bytes=len(cache))
        launch = table.write(targets, 0 * ints, ints, ints + 1, buffer_bytes=len(buffer))
        targets["block"] += beyond
        for direction in ("gather", "scatter"):
            backend.run(Copy(direction, table, launch, targets, cache, buffer, 2))


@pytest.mark.parametrize("beyond", [0, 1])
def test_no_access_is_out_of_bounds(beyond: int) -> None:
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_sanitized", str(beyond)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ("heap-buffer-overflow" in done.stderr) == bool(beyond), done.stderr
    assert (done.returncode != 0) == bool(beyond), done.stderr


if __name__ == "__main__":
    copy_everything(beyond=int(sys.argv[1]))
