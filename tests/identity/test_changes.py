"""Files that came into the place of others tell, however old they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lmkv_ray.identity import changed_since

MADE = 10.0
"""Seconds since 1970: files look older than what is done to them."""


def tick(directory: Path, moment: float) -> None:
    """Until the file system's clock is past a moment."""
    clock = directory / "clock"
    clock.touch()
    while clock.stat().st_mtime <= moment:
        clock.touch()


def written(root: Path) -> Path:
    file = root / "models" / "v1" / "w"
    file.write_bytes(b"other")
    return file


def set_back(root: Path) -> Path:
    file = written(root)
    os.utime(file, (MADE, MADE))
    return file


def renamed(root: Path) -> Path:
    (root / "models" / "v2" / "w").replace(root / "models" / "v1" / "w")
    return root / "models" / "v1" / "w"


def directories_renamed(root: Path) -> Path:
    shutil.rmtree(root / "models" / "v1")
    (root / "models" / "v2").rename(root / "models" / "v1")
    return root / "models" / "v1"


def link_moved(root: Path) -> Path:
    (root / "current").unlink()
    (root / "current").symlink_to(root / "models" / "v2")
    return root / "current"


def link_on_the_way_moved(root: Path) -> Path:
    (root / "all").unlink()
    (root / "all").symlink_to("others")
    return root / "all"


@pytest.mark.parametrize(
    "change", [written, set_back, renamed, directories_renamed, link_moved, link_on_the_way_moved]
)
def test_each_way_to_exchange_a_file_is_seen(
    change: Callable[[Path], Path], tmp_path: Path
) -> None:
    for parent in ("models", "others"):
        for version in ("v1", "v2"):
            (tmp_path / parent / version).mkdir(parents=True)
            (tmp_path / parent / version / "w").write_bytes(version.encode())
    (tmp_path / "all").symlink_to("models")
    (tmp_path / "current").symlink_to("all/v1")
    file = tmp_path / "current" / "w"
    tick(tmp_path, (tmp_path / "current").lstat().st_ctime)
    moment = (tmp_path / "clock").stat().st_mtime
    tick(tmp_path, moment)
    (tmp_path / "models" / "v3").mkdir()
    assert changed_since(file, moment) is None, "another model beside it"
    changed = change(tmp_path)
    assert changed_since(file, moment) == changed


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="too many links"):
        changed_since(tmp_path / "a", 2e10)
