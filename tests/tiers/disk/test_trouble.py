"""Disks that are full, read-only, slow, broken or not there."""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
import time
from typing import Any

import numpy as np
import pytest

from lmkv_ray.errors import TierError
from lmkv_ray.fetch import Failure, Fetch
from lmkv_ray.keys import key_list
from lmkv_ray.tiers.disk import reads
from lmkv_ray.tiers.disk.folder import DiskFolder
from tests.tiers.disk.conftest import FILE, Remount, present
from tests.tiers.harness import COUNT, DiskHarness, fetch, slots, some_keys, store, until

KEYS = some_keys()
MANY = some_keys(100, seed=1)


async def test_a_full_file_system(tmpfs: tuple[DiskHarness, Remount]) -> None:
    """Larger budget than disk, and then somebody else takes all that is left."""
    disk, _ = tmpfs
    tier = await disk.open()
    results = [ok for key in MANY for ok in await store(tier, key[None])]
    assert any(results)
    assert not all(results)
    assert tier.status().counters["troubles"]
    held = MANY[np.flatnonzero(await tier.lookup(MANY, 1.0))]
    assert len(held) > 20
    problem = tier.status().problem
    if problem is not None:  # not mended yet
        assert "No space left" in problem
    outcomes = await fetch(tier, held[:10], slots(10))
    assert any(outcome.ok for outcome in outcomes), "what is there can be read all the time"
    await until(lambda: tier.status().problem is None)
    assert await store(tier, KEYS[:1]) == [True], "it made room for itself"
    await tier.close()


async def test_a_disk_that_others_fill(tmpfs: tuple[DiskHarness, Remount]) -> None:
    disk, _ = tmpfs
    tier = await disk.open(capacity=1 << 20)
    assert all(await store(tier, MANY[:5]))
    hog = disk.path.with_name("hog")
    with contextlib.suppress(OSError):
        hog.write_bytes(bytes(8 << 20))
    assert await store(tier, KEYS[:1]) == [False]
    assert await store(tier, KEYS[:1]) == [False]
    assert (await fetch(tier, MANY[4:5], slots(1)))[0].ok
    hog.unlink()
    await until(lambda: tier.status().problem is None)
    assert await store(tier, KEYS[:1]) == [True]
    await tier.close()


async def test_a_read_only_file_system(tmpfs: tuple[DiskHarness, Remount]) -> None:
    disk, remount = tmpfs
    tier = await disk.open(capacity=2 << 20)
    assert all(await store(tier, KEYS[2:]))
    assert all(await store(tier, KEYS[:2], space=8))
    remount("ro")
    assert await store(tier, MANY[:1]) == [False]
    assert "read-only" in str(tier.status().problem)
    assert all(outcome.ok for outcome in await fetch(tier, KEYS, slots(COUNT)))
    await tier.clear(8, 2)
    assert await store(tier, MANY[:1]) == [False]
    await tier.clear(99, 3)
    assert await present(tier, KEYS) == COUNT - 2
    assert not tier.settled
    assert tier._mount.files.folder.cleared() == 0  # type: ignore[union-attr]
    remount("rw")
    await until(lambda: tier.status().problem is None and tier.settled)
    assert tier._mount.files.folder.cleared() == 3  # type: ignore[union-attr]
    assert await store(tier, MANY[:1]) == [True]
    assert await present(tier, KEYS) == COUNT - 2, "what was removed does not come back"
    assert len(disk.all_files()) == COUNT - 2 + 1
    assert disk.nbytes() == tier.status().nbytes
    await tier.close()


async def test_a_disk_that_is_read_only_or_full_at_the_start_is_read(
    tmpfs: tuple[DiskHarness, Remount],
) -> None:
    disk, remount = tmpfs
    tier = await disk.open()
    assert all(await store(tier, KEYS))
    await tier.close()
    left = disk.path / "tmp" / "7"
    left.write_bytes(bytes(1000))
    remount("ro")
    tier = await disk.open()
    assert "read-only" in str(tier.status().problem)
    assert all(outcome.ok for outcome in await fetch(tier, KEYS, slots(COUNT)))
    remount("rw")
    await until(lambda: tier.status().problem is None)
    assert not left.exists()
    await tier.close()
    hog = disk.path.with_name("hog")
    with contextlib.suppress(OSError):
        hog.write_bytes(bytes(8 << 20))
    tier = await disk.open()
    assert "No space" in str(tier.status().problem)
    assert (await fetch(tier, KEYS[-1:], slots(1)))[0].ok
    hog.unlink()
    await until(lambda: tier.status().problem is None)
    await tier.close()


async def test_a_disk_that_takes_its_time_to_open_is_opened_beside(
    disk: DiskHarness, monkeypatch: Any
) -> None:
    monkeypatch.setattr("lmkv_ray.tiers.disk.tier.OPEN_SECONDS", 0.05)
    go_on, scan = threading.Event(), DiskFolder.scan

    def slow_scan(self: DiskFolder, *args: Any) -> Any:
        go_on.wait()
        return scan(self, *args)

    monkeypatch.setattr(DiskFolder, "scan", slow_scan)
    tier = await disk.open()
    assert "still being opened" in str(tier.status().problem)
    assert await store(tier, KEYS[:1]) == [False]
    go_on.set()
    await until(lambda: tier.status().problem is None)
    assert await store(tier, KEYS[:1]) == [True]
    await tier.close()


async def test_a_disk_that_is_not_there_yet(disk: DiskHarness) -> None:
    disk.path.write_text("not a directory")
    tier = await disk.open()
    assert "LMKV_DISK_DIR" in str(tier.status().problem)
    assert await store(tier, KEYS) == [False] * COUNT
    await tier.clear(None, 0)
    disk.path.unlink()
    await until(lambda: tier.status().problem is None)
    assert await store(tier, KEYS) == [True] * COUNT
    await tier.close()


async def test_pins_survive_a_remount(disk: DiskHarness) -> None:
    tier = await disk.open(capacity=COUNT * FILE)
    assert all(await store(tier, KEYS))
    await tier.pin(KEYS[:1], True)
    shutil.rmtree(disk.path / "tmp")
    disk.path.joinpath("tmp").write_text("in the way")
    assert await store(tier, MANY[:1]) == [False]
    disk.path.joinpath("tmp").unlink()
    await until(lambda: tier.status().problem is None)
    for key in MANY:
        assert await store(tier, key[None]) == [True]
    assert await present(tier, KEYS) == 1, "the pinned one"
    await tier.close()


async def test_another_shard_took_the_directory_meanwhile(disk: DiskHarness) -> None:
    tier = await disk.open()
    shutil.rmtree(disk.path)
    other = await disk.open()
    assert await store(tier, KEYS[:1]) == [False]
    with pytest.raises(TierError):
        await disk.open()
    await until(lambda: "another shard" in str(tier.status().problem))
    assert await store(other, KEYS[:1]) == [True]
    await other.close()
    await until(lambda: tier.status().problem is None)
    assert await present(tier, KEYS) == 1
    await tier.close()


async def test_an_io_error_loses_one_chunk(disk: DiskHarness) -> None:
    broken = key_list(KEYS)[3]

    class Files(disk.files):  # type: ignore[misc, name-defined]
        def read(self, label: Any, *args: Any) -> Any:
            if label.key == broken:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(label, *args)

    tier = await disk.open(make_files=Files)
    assert all(await store(tier, KEYS))
    (outcome,) = await fetch(tier, KEYS[3:4], slots(1))
    assert outcome.failure == Failure.LOST
    assert "Input/output" in outcome.detail
    await until(lambda: tier.status().problem is None)
    assert (await tier.lookup(KEYS, 1.0)).tolist() == [i != 3 for i in range(COUNT)]
    assert not list(disk.path.glob(f"??/{broken.hex()}*"))
    await tier.close()


async def test_a_bug_is_trouble_and_no_exception(disk: DiskHarness) -> None:
    class Files(disk.files):  # type: ignore[misc, name-defined]
        def write(self, *args: Any) -> bool:
            raise ValueError("a bug")

    tier = await disk.open(make_files=Files)
    assert await store(tier, KEYS[:1]) == [False]
    assert "a bug" in str(tier.status().problem)
    await until(lambda: tier.status().problem is None)
    assert tier.status().nbytes == 0
    await tier.close()


async def test_a_hanging_disk_holds_back_only_what_it_has(
    disk: DiskHarness, monkeypatch: Any
) -> None:
    monkeypatch.setattr(reads, "SLOW_SECONDS", 0.05)
    tier = await disk.open(threads=2)
    assert all(await store(tier, KEYS))
    release = disk.hold_reads()
    into = slots(COUNT)
    begin = time.monotonic()
    outcomes = []
    async for outcome in tier.fetch(Fetch(KEYS, into, 0.3)):
        outcomes.append(outcome)
        if len(outcomes) == COUNT - 2:
            assert {o.failure for o in outcomes} == {Failure.LATE}
            assert time.monotonic() - begin < 10
            assert "a read took" in str(tier.status().problem)
            assert not (await tier.lookup(KEYS, 1.0)).any(), "nobody else is sent there"
            release()
    assert len(outcomes) == COUNT
    assert not any(into[o.position].any() for o in outcomes if o.failure)
    await until(lambda: tier.status().problem is None)
    assert all(outcome.ok for outcome in await fetch(tier, KEYS, into))
    await tier.close()
