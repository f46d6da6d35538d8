"""A folder in use: files and index, kept in step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmkv_ray.clock import Clock
from lmkv_ray.policies import Policy
from lmkv_ray.tiers.cipher import Cipher
from lmkv_ray.tiers.disk.files import ChunkFiles
from lmkv_ray.tiers.disk.folder import DiskFolder
from lmkv_ray.tiers.disk.index import DiskIndex
from lmkv_ray.tiers.disk.medium import Medium

DEFAULT_SHARE = 4
"""Without a capacity: this part of what the file system could give us."""


@dataclass(eq=False)
class Mount:
    """What ``open_mount`` made."""

    files: ChunkFiles
    index: DiskIndex
    cleared: int
    """The number of the last clear that was carried out in this folder."""
    in_use: bool = True
    """Nothing has come in its place. What is not in use is not asked."""


@dataclass(frozen=True)
class Recipe:
    """How to make a mount."""

    path: Path
    capacity: int | None
    make_policy: Callable[[], Policy]
    make_files: Callable[[DiskFolder, Cipher | None, int, Clock], ChunkFiles]
    cipher: Cipher | None
    writes: int
    """How many files are written at a time."""
    medium: Medium
    clock: Clock


def open_mount(recipe: Recipe, last: Mount | None) -> Mount:
    """Take the folder into use. Blocks: 100,000 chunks take a few seconds.

    Args:
        recipe: how.
        last: the mount before this one, which nothing uses any more: what was pinned stays pinned,
            what was forgotten stays forgotten.

    Raises:
        TakenError, TierError: see ``DiskFolder.open`` and ``DiskFolder.scan``.
        OSError: what the medium says.
    """
    folder = _folder(recipe, last)
    try:
        files = recipe.make_files(folder, recipe.cipher, recipe.writes, recipe.clock)
        scan = folder.scan(files.suite, files.overhead)
        files.littered = scan.littered
        capacity = recipe.capacity
        if capacity is None:
            used = sum(file.blocks for file in scan.found)
            capacity = (folder.tree.free() + used) // DEFAULT_SHARE
        index = DiskIndex(capacity, recipe.make_policy())
        forgotten = set(last.index.going()) if last else set()
        for file in scan.found:
            if file.label.key in forgotten or index.knows(file.label.key):
                files.remove(file.label)
            else:
                index.recover(file.label, file.blocks)
        for entry in index.make_room(0, 0) or ():
            files.remove(entry.label)
            index.erased(entry)
        for key in last.index.keys(pinned=True) if last else ():
            index.pin(key, True)
        return Mount(files, index, folder.cleared())
    except BaseException:
        if last is None or folder is not last.files.folder:
            folder.close()
        raise


def _folder(recipe: Recipe, last: Mount | None) -> DiskFolder:
    """The folder that is still ours, or a new one."""
    if last is not None:
        try:
            last.files.folder.check()
        except OSError:
            last.files.folder.close()
        else:
            return last.files.folder
    return DiskFolder.open(recipe.path, recipe.medium, recipe.clock)
