"""Whose memory is mapped: a file that another user made, or can open, is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lmkv_ray.arena import ArenaReader, ArenaWriter, find_arena
from lmkv_ray.arena.segment import DEFAULT_DIRECTORY, Segment
from lmkv_ray.errors import ArenaError
from tests.arena.conftest import CAPACITY, Spawn

STRANGER = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def plant(connection: Connection, name: str, ids: tuple[int, int, int]) -> None:
    """A stranger's arena, held by a process with these (real, effective, saved) user ids."""
    os.seteuid(STRANGER)
    writer = ArenaWriter.create(name, CAPACITY)
    fcntl.flock(writer._segment.fd, fcntl.LOCK_UN)  # as if its writer had died
    os.seteuid(0)
    os.setresuid(*ids)
    connection.send(writer.path)
    connection.recv()


def hold(connection: Connection, name: str) -> None:
    """An arena of ours in a process that a stranger started, and may yet be again."""
    writer = ArenaWriter.create(name, CAPACITY)
    fcntl.flock(writer._segment.fd, fcntl.LOCK_UN)
    os.setresuid(STRANGER, 0, 0)
    connection.send(writer.path)
    connection.recv()


@as_root
@pytest.mark.parametrize("ids", [(STRANGER, 0, 0), (0, 0, 0)], ids=["set-uid", "root"])
def test_a_planted_arena_is_not_adopted_and_not_mapped(
    spawn: Spawn, name: str, ids: tuple[int, int, int]
) -> None:
    """The stranger writes it, and a root process holds it, such as su waiting for a password."""
    _, planted = spawn(plant, f"{name}.node", ids)
    path = planted.recv()
    assert ArenaWriter.find_and_adopt(f"{name}.node") is None
    assert find_arena(name) is None
    with pytest.raises(ArenaError, match=rf"belongs to user {STRANGER}, not to user 0"):
        ArenaReader.attach(path)
    with pytest.raises(ArenaError, match=rf"belongs to user {STRANGER}, not to user 0"):
        ArenaWriter.adopt(path)


@as_root
def test_a_process_that_is_partly_another_users_is_not_searched(spawn: Spawn, name: str) -> None:
    _, held = spawn(hold, name)
    held.recv()
    assert not list(Segment.find(name))


@pytest.fixture
def segment(name: str) -> Iterator[Segment]:
    segment = Segment.create(DEFAULT_DIRECTORY, name, CAPACITY)
    yield segment
    segment.close()


@pytest.mark.parametrize("mode", [0o640, 0o602, 0o601])
def test_memory_that_others_can_open_is_refused(segment: Segment, mode: int) -> None:
    os.fchmod(segment.fd, mode)
    with pytest.raises(ArenaError, match=rf"mode {mode:o}"):
        Segment.open(segment.path)


def test_memory_that_has_a_name_is_refused(name: str) -> None:
    """Every file of ours has lost its name; this one can be opened by a path, now or later."""
    path = Path(f"/dev/shm/lmkv-{name}-{0:016x}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with pytest.raises(ArenaError, match="still has a name"):
            Segment.open(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)
        path.unlink()


def test_memory_that_got_a_second_name_meanwhile_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between creation and unlinking, whoever may write to the directory can link the file."""
    unlink = Path.unlink

    def linked(path: Path, missing_ok: bool = False) -> None:
        os.link(path, tmp_path / "second")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", linked)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ArenaError, match="still has a name"):
        Segment.create(tmp_path, name, 4096)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
