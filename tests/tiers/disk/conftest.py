"""File systems that can be full, read-only and slow."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiers.harness import DiskHarness


@pytest.fixture
def disk(tmp_path: Path) -> DiskHarness:
    return DiskHarness(tmp_path)


Remount = Callable[[str], None]


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
