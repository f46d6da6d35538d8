"""Memory without a name: who may open it, how it is found, and that it is gone in the end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmkv_ray.arena.segment import DEFAULT_DIRECTORY, Segment, populate
from lmkv_ray.errors import ArenaError

MIB = 1 << 20


@pytest.fixture
def segment(name: str) -> Iterator[Segment]:
    segment = Segment.create(DEFAULT_DIRECTORY, name, MIB)
    yield segment
    segment.close()


def test_it_has_no_name_and_is_private(segment: Segment) -> None:
    status = os.fstat(segment.fd)
    assert status.st_nlink == 0
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == MIB
    assert status.st_blocks == 0, "nothing is allocated yet"


def test_others_open_it_by_its_path(segment: Segment) -> None:
    other = Segment.open(segment.path)
    segment.map(writable=True)[5] = 42
    assert other.map(writable=False)[5] == 42
    other.close()


def test_it_is_found_by_name_while_somebody_holds_it(segment: Segment, name: str) -> None:
    other = Segment.open(segment.path)
    segment.close()
    (found,) = Segment.find(name)
    assert found == other.path
    assert not list(Segment.find(name[:-1])), "a prefix is another name"
    other.close()
    assert not list(Segment.find(name))


def test_views_outlive_close(segment: Segment) -> None:
    view = segment.map(writable=True)
    segment.close()
    segment.close()
    view[-1] = 1
    assert view[-1] == 1


def test_allocate_and_populate(segment: Segment) -> None:
    segment.allocate(0, MIB)
    assert os.fstat(segment.fd).st_blocks * 512 == MIB
    view = segment.map(writable=True)
    populate(view, writable=True)
    assert not view.any()


def test_read_only_maps_are_read_only(segment: Segment) -> None:
    with pytest.raises(ValueError, match="read-only"):
        segment.map(writable=False)[0] = 1


def test_a_closed_path_is_a_typed_error(segment: Segment) -> None:
    path = segment.path
    segment.close()
    with pytest.raises(ArenaError, match="cannot be opened"):
        Segment.open(path)


def test_a_path_that_became_something_else_is_a_typed_error() -> None:
    ours, theirs = os.pipe()
    with pytest.raises(ArenaError, match="not shared memory"):
        Segment.open(f"/proc/{os.getpid()}/fd/{ours}")
    os.close(ours)
    os.close(theirs)


def test_a_missing_directory_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match=r"does not exist.*LMKV_ARENA_DIR"):
        Segment.create(tmp_path / "nowhere", "x", MIB)


def test_an_unwritable_directory_is_a_typed_error() -> None:
    # Not even root creates files there.
    with pytest.raises(ArenaError, match="No file can be created"):
        Segment.create(Path("/proc"), "x", 0)


def test_too_little_space_names_numbers_and_remedies(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match=r"1048576 MiB are wanted .* LMKV_CAPACITY, or enlarge"):
        Segment.create(DEFAULT_DIRECTORY, "x", 1 << 40)


def test_a_bad_name_is_a_typed_error() -> None:
    with pytest.raises(ArenaError, match="cannot name"):
        Segment.create(DEFAULT_DIRECTORY, "../x", MIB)


def test_create_sweeps_what_a_killed_creation_left(tmp_path: Path) -> None:
    left = tmp_path / f"lmkv-node-{0:016x}"
    left.touch()
    kept = tmp_path / "lmkv-notes.txt"
    kept.touch()
    Segment.create(tmp_path, "x", 4096).close()
    assert list(tmp_path.iterdir()) == [kept]


def test_no_fd_is_lost(name: str) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(5):
        segment = Segment.create(DEFAULT_DIRECTORY, name, MIB)
        view = segment.map(writable=True)
        segment.close()
        assert not np.any(view[:10])
        del view
    assert count() == before


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EOPNOTSUPP, errno.EFBIG, errno.EPERM])
def test_memory_that_is_refused_for_any_reason_is_a_typed_error(
    segment: Segment, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard goes on with less memory after an ``ArenaError``, and loses count after another."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ArenaError, match="LMKV_"):
        segment.allocate(0, 4096)
