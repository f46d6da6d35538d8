"""On a full tmpfs there are typed errors and never a SIGBUS (which would kill the engine)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lmkv_ray.arena import ArenaReader, ArenaWriter, this_process
from lmkv_ray.errors import ArenaError
from tests.arena.conftest import CAPACITY, SLOT, Spawn, content_of, fill, some_keys

MIB = 1 << 20
KEYS = some_keys(40)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)]
    if not (mount and umount) or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield tmp_path
    # Lazily: views of an arena may still be on their way out.
    subprocess.run([str(umount), "-l", str(tmp_path)], check=True)


def use_a_full_tmpfs(connection: Connection, directory: str) -> None:
    """In a process of its own, as a SIGBUS would end it."""
    writer = ArenaWriter.create("testfull", CAPACITY, directory=Path(directory))
    first = writer.assign_extent(0, SLOT)
    hog = Path(directory) / "hog"
    with hog.open("wb") as file:
        free = os.statvfs(directory).f_bavail * 4096
        os.posix_fallocate(file.fileno(), 0, free - MIB // 2)
    with pytest.raises(ArenaError, match=r"MiB are wanted.*LMKV_CAPACITY"):
        writer.assign_extent(1, SLOT)
    with pytest.raises(ArenaError, match="assigned extents"):
        writer.reserve(first + writer.geometry.slots_per_extent, this_process())

    reader = ArenaReader.attach(writer.path)
    assert sum(reader.populate()) == MIB
    fill(writer, first, KEYS[: len(first)])
    # Whatever a damaged index says, no page is touched that does not exist.
    places = range(0, writer.geometry.slots, writer.geometry.slots // 20)
    writer._tables.index.insert(KEYS[20:], list(places)[:20])
    hits = reader.lookup(KEYS)
    assert hits.found.tolist() == [True] * len(first) + [False] * (40 - len(first))
    for i in range(len(first)):
        at = int(hits.offsets[i])
        assert (reader.data[at : at + SLOT] == content_of(KEYS[i])).all()
    assert not reader.reasons(KEYS[20:])[0].startswith("evicted")

    hog.unlink()
    assert len(writer.assign_extent(1, SLOT)), "and it grows when there is room again"
    writer.close()
    reader.close()
    connection.send("done")


def test_a_full_tmpfs_never_kills(tmpfs: Path, spawn: Spawn) -> None:
    process, child = spawn(use_a_full_tmpfs, str(tmpfs))
    assert child.poll(60)
    assert child.recv() == "done"
    process.join()
    assert process.exitcode == 0


def test_an_arena_larger_than_the_tmpfs_is_refused_at_start(tmpfs: Path) -> None:
    with pytest.raises(ArenaError, match=r"but [78] MiB are free.*LMKV_CAPACITY, or enlarge"):
        ArenaWriter.create("test", 16 * MIB, directory=tmpfs)
    assert not list(tmpfs.iterdir())
