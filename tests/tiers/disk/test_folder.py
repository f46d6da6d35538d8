"""Whose directory it is, and what is left in it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import xxhash

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.errors import TierError
from lmkv_ray.tiers.disk.folder import DiskFolder
from lmkv_ray.tiers.disk.local import LocalMedium
from lmkv_ray.tiers.format import Label, file_bytes
from tests.tiers.harness import SECONDS, DiskHarness, fetch, slots, some_keys, store, until

LABEL = Label(bytes(range(16)), 5, 1000)


def opened(path: Path) -> DiskFolder:
    return DiskFolder.open(path, LocalMedium(), SYSTEM_CLOCK)


def hold(path: Path, connection: Connection) -> None:
    folder = opened(path)
    connection.send("held")
    connection.recv()
    folder.close()


def test_two_owners_are_refused_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    path = tmp_path / "tier"
    owner = context.Process(target=hold, args=(path, theirs), daemon=True)
    owner.start()
    assert ours.recv() == "held"
    with pytest.raises(TierError, match=r"in use by another shard.*LMKV_DISK_DIR"):
        opened(path)
    owner.kill()
    owner.join()
    opened(path).close()


def test_not_even_one_process_owns_it_twice(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with pytest.raises(TierError):
        opened(tmp_path)
    folder.close()
    opened(tmp_path).close()


def test_a_directory_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TierError, match="neither empty nor a disk tier"):
        opened(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_fresh_file_system_is_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    opened(tmp_path).close()


def test_a_scan_keeps_what_may_be_sound_and_removes_the_rest(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.probe(0)
    folder.scan("plain1", 0)
    size = file_bytes(LABEL.nbytes, 0)
    good = LABEL.path("plain1")
    newer = Label(b"\1" * 16, 5, 1000).path("plain1")
    bad = {
        "tmp/7": size,
        Label(b"\2" * 16, 5, 1000).path("plain1"): size - 1,  # cut
        Label(b"\3" * 16, 5, 1000).path("plain1"): 0,
        "00/what": 10,
    }
    for name, nbytes in {newer: size, good: size, **bad}.items():
        (tmp_path / name).write_bytes(b"x" * nbytes)
    os.utime(tmp_path / good, (1000, 1000))
    (tmp_path / "00" / "somebody's directory").mkdir()
    scan = folder.scan("plain1", 0)
    found = scan.found
    assert [file.label.path("plain1") for file in found] == [good, newer], "by time of use"
    assert found[0].used == 1000
    assert not scan.littered
    assert all(file.blocks >= size for file in found)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}
    assert left == {good, newer, "00/somebody's directory"}
    folder.close()


def test_a_file_in_another_files_place_is_not_believed_to_be_ours(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.scan("plain1", 0)
    name = LABEL.path("plain1").split("/")[1]
    (tmp_path / "ff" / name).write_bytes(bytes(file_bytes(LABEL.nbytes, 0)))
    assert not folder.scan("plain1", 0).found
    assert not list(tmp_path.glob("ff/*"))
    folder.close()


def test_a_replaced_directory_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "tier"
    folder = opened(path)
    folder.check()
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="No such file"):
        folder.check()
    path.mkdir()
    with pytest.raises(OSError, match="replaced"):
        folder.check()
    folder.close()
    assert folder.closed


def test_a_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path).close()
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(TierError, match=f"belongs to user.*chown {another} {tmp_path}"):
        opened(tmp_path)
    assert not list(tmp_path.glob("??"))


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777, 0o2775])
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path, link = tmp_path / "tier", tmp_path / "link"
    opened(path).close()
    path.chmod(mode)
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(TierError, match=f"chmod go-w {name}"):
            opened(name)
    path.chmod(0o755)
    opened(path).close()


def test_what_others_may_have_written_in_it_is_not_believed(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.scan("plain1", 0)
    size = file_bytes(LABEL.nbytes, 0)
    good, other = LABEL.path("plain1"), Label(b"\3" * 16, 5, 1000).path("plain1")
    for name in (good, other):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / other).chmod(0o666)
    assert [file.label for file in folder.scan("plain1", 0).found] == [LABEL]
    assert not (tmp_path / other).exists()
    (tmp_path / "00").chmod(0o777)
    with pytest.raises(TierError, match="may be written by other users"):
        folder.scan("plain1", 0)
    assert (tmp_path / good).exists()
    folder.close()


async def test_what_is_on_a_disk_is_for_this_user_only(disk: DiskHarness) -> None:
    before = os.umask(0)
    try:
        tier = await disk.open()
        assert all(await store(tier, some_keys(3)))
        await tier.clear(99, 5)
        await tier.close()
    finally:
        os.umask(before)
    for path in (disk.path, *disk.path.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


async def test_a_predecessor_that_is_just_ending_is_waited_for(disk: DiskHarness) -> None:
    """A shard that is restarted may come before the last one has let go."""
    last = await disk.open()
    coming = asyncio.create_task(disk.open(patience=SECONDS))
    await asyncio.sleep(0.1)
    assert not coming.done()
    await last.close()
    next_one = await coming
    assert next_one.status().problem is None
    await next_one.close()


async def test_what_is_no_file_is_not_waited_for(disk: DiskHarness) -> None:
    """A pipe in a chunk's place, and one in the place of the number of the last clear."""
    tier = await disk.open()
    keys = some_keys()
    assert all(await store(tier, keys))
    [*files] = disk.path.glob("*/*-*")
    files[1].unlink()
    files[1].symlink_to(files[2])
    outcomes = await asyncio.wait_for(fetch(tier, keys, slots(len(keys))), SECONDS)
    assert sum(outcome.ok for outcome in outcomes) == len(keys) - 1
    assert not files[1].is_symlink()
    assert files[2].exists()
    files[0].unlink()
    os.mkfifo(files[0], 0o600)
    await asyncio.wait_for(fetch(tier, keys, slots(len(keys))), SECONDS)
    await until(lambda: tier.status().problem is None)
    assert not files[0].exists()
    outcomes = await fetch(tier, keys, slots(len(keys)))
    assert sum(outcome.ok for outcome in outcomes) == len(keys) - 2
    await tier.close()
    os.mkfifo(disk.path / "CLEARED", 0o600)
    tier = await asyncio.wait_for(disk.open(), SECONDS)
    assert "Next step" in str(tier.status().problem)
    await tier.close()


@pytest.mark.parametrize("number", [b"9" * 30, b"%d" % ((1 << 62) + 1)])
def test_the_number_of_a_clear_that_no_clock_says_is_none(tmp_path: Path, number: bytes) -> None:
    """It would be higher than those of all clears that come."""
    folder = opened(tmp_path)
    check = xxhash.xxh3_64_hexdigest(number).encode()
    (tmp_path / "CLEARED").write_bytes(number + b" " + check)
    assert folder.cleared() == 0
    folder.close()
