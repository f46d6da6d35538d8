"""Disks of tests; file systems that can be full and read-only."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmkv_ray.keys import KeyArray
from lmkv_ray.tiers import Tier
from tests.tiers.harness import DiskHarness

FILE = 68 << 10
"""Bytes a chunk's file takes: header and 64,536 bytes in whole pages."""
Remount = Callable[[str], None]


async def present(tier: Tier, keys: KeyArray) -> int:
    """How many of these chunks it holds."""
    return int((await tier.lookup(keys, 1.0)).sum())


@pytest.fixture
def disk(tmp_path: Path) -> DiskHarness:
    return DiskHarness(tmp_path)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[tuple[DiskHarness, Remount]]:
    """A tier's directory on a file system of 4 MiB, and how to change its options."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    path = tmp_path / "mounted"
    path.mkdir()
    command = [str(mount), "-t", "tmpfs", "-o", "size=4m", "none", str(path)]
    if not (mount and umount) or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")

    def remount(options: str) -> None:
        subprocess.run([str(mount), "-o", f"remount,{options}", str(path)], check=True)

    yield DiskHarness(path), remount
    subprocess.run([str(umount), "-l", str(path)], check=True)
