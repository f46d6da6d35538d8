"""What only a disk does: the budget, eviction, and disks in trouble."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import threading
import time
from typing import Any

import numpy as np
import pytest

from lmkv_ray.errors import TierError
from lmkv_ray.keys import key_list
from lmkv_ray.tiers.disk import reading
from lmkv_ray.tiers.disk.directory import Directory
from lmkv_ray.transports import Failure, Fetch
from tests.tiers.disk.conftest import Remount
from tests.tiers.harness import (
    COUNT,
    DiskHarness,
    arrived,
    chunk,
    fetch,
    slots,
    some_keys,
    store,
    until,
)

KEYS = some_keys()
MANY = some_keys(100, seed=1)
FILE = 68 << 10
"""A chunk's file: header and 64,536 bytes in whole pages."""


async def present(tier: Any, keys: np.ndarray) -> int:
    return int((await tier.lookup(keys, 1.0)).sum())


async def test_the_budget_holds_at_all_times(tmpfs: tuple[DiskHarness, Remount]) -> None:
    """Also while chunks are written, evicted, removed and read by several tasks."""
    disk, _ = tmpfs
    capacity = 10 * FILE + 1000
    tier = await disk.open(capacity=capacity, threads=8)
    empty = os.statvfs(disk.path).f_bfree
    taken = []

    def sample() -> bool:
        """When a file is written and not yet published, in a thread of the tier."""
        taken.append((empty - os.statvfs(disk.path).f_bfree) * 4096)
        return True

    async def work(task: int) -> None:
        for part in range(0, 100, 5):
            keys = np.roll(MANY, task * 25, axis=0)[part : part + 5]
            await store(tier, keys, intact=sample)
            await fetch(tier, keys, slots(5))
            if task == 2:
                await tier.remove(keys[:2])

    await asyncio.gather(*(work(task) for task in range(4)))
    assert 5 * FILE < max(taken) <= capacity
    status = tier.status()
    assert disk.nbytes() == status.nbytes <= capacity
    assert status.counters["evicted"] > 50
    assert status.chunks == len(disk.all_files())
    await tier.close()


async def test_a_smaller_budget_holds_from_the_start(disk: DiskHarness) -> None:
    tier = await disk.open()
    assert all(await store(tier, KEYS))
    await tier.close()
    again = await disk.open(capacity=4 * FILE)
    assert await present(again, KEYS) == 4
    assert disk.nbytes() == 4 * FILE
    await again.close()


async def test_the_default_budget_is_a_part_of_what_could_be_had(disk: DiskHarness) -> None:
    tier = await disk.open(capacity=None)
    usage = shutil.disk_usage(disk.path)
    assert 0 < tier.status().capacity <= usage.total // 4
    await tier.close()


async def test_what_is_used_stays_and_so_does_what_is_pinned(disk: DiskHarness) -> None:
    tier = await disk.open(capacity=6 * FILE)
    assert all(await store(tier, KEYS[:6]))
    await tier.pin(KEYS[:2], True)
    assert all(outcome.ok for outcome in await fetch(tier, KEYS[2:4], slots(2)))
    assert all(await store(tier, KEYS[6:8]))
    assert (await tier.lookup(KEYS[:8], 1.0)).tolist() == [True] * 4 + [False] * 2 + [True] * 2
    await tier.pin(KEYS[2:8], True)
    assert await store(tier, KEYS[8:9]) == [False], "all that is there is pinned"
    assert tier.status().counters["store_no_room"] == 1
    await tier.pin(KEYS[:1], False)
    assert await store(tier, KEYS[8:9]) == [True]
    assert (await tier.lookup(KEYS[:2], 1.0)).tolist() == [False, True]
    await tier.close()


async def test_a_chunk_that_is_read_is_not_evicted(disk: DiskHarness) -> None:
    tier = await disk.open(capacity=2 * FILE)
    assert all(await store(tier, KEYS[:2]))
    release = disk.hold_reads()
    into = slots(1)
    task = asyncio.create_task(fetch(tier, KEYS[:1], into))
    await asyncio.sleep(0)
    await store(tier, KEYS[2:3])
    assert (await tier.lookup(KEYS[:3], 1.0)).tolist() == [True, False, True]
    release()
    assert (await task)[0].ok
    await tier.close()


async def test_recency_survives_restarts(disk: DiskHarness) -> None:
    tier = await disk.open()
    for i, key in enumerate(KEYS[:3]):
        assert await store(tier, key[None]) == [True]
        # The kernel's clock for files moves in steps that are longer than a store.
        os.utime(disk.file(key.tobytes()), (i + 1, i + 1))
    assert (await fetch(tier, KEYS[:1], slots(1)))[0].ok
    await tier.close()
    again = await disk.open(capacity=2 * FILE)
    assert (await again.lookup(KEYS[:3], 1.0)).tolist() == [True, False, True]
    await again.close()


async def test_every_flipped_byte_is_noticed(disk: DiskHarness) -> None:
    tier = await disk.open()
    into = slots(1)
    for offset in (0, 9, 20, 40, 50, 60, 4090, 4096, 30_000, 68_631):
        assert await store(tier, KEYS[:1]) == [True]
        disk.flip(KEYS[0].tobytes(), offset)
        assert (await fetch(tier, KEYS[:1], into))[0].failure == Failure.CORRUPT
    await tier.close()


async def test_a_file_under_another_files_name_is_noticed(disk: DiskHarness) -> None:
    tier = await disk.open()
    assert all(await store(tier, KEYS[:2]))
    shutil.copy(disk.file(KEYS[0].tobytes()), disk.file(KEYS[1].tobytes()))
    outcomes = await fetch(tier, KEYS[:2], slots(2))
    assert [outcome.failure for outcome in outcomes] == [None, Failure.CORRUPT]
    await tier.close()


async def test_without_o_direct_it_does_the_same(disk: DiskHarness, monkeypatch: Any) -> None:
    really_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    tier = await disk.open()
    into = slots(COUNT)
    assert all(await store(tier, KEYS))
    assert all(outcome.ok for outcome in await fetch(tier, KEYS, into))
    assert all(arrived(slot, key) for slot, key in zip(into, KEYS, strict=True))
    assert tier.status().problem is None
    await tier.close()


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
    assert all(await store(tier, KEYS))
    remount("ro")
    assert await store(tier, MANY[:1]) == [False]
    assert "read-only" in str(tier.status().problem)
    assert all(outcome.ok for outcome in await fetch(tier, KEYS, slots(COUNT)))
    await tier.remove(KEYS[:2])
    assert await store(tier, MANY[:1]) == [False]
    await tier.clear(99, 3)
    assert await present(tier, KEYS) == COUNT - 2
    assert not tier.settled
    assert tier._mount.files.directory.cleared() == 0  # type: ignore[union-attr]
    remount("rw")
    await until(lambda: tier.status().problem is None and tier.settled)
    assert tier._mount.files.directory.cleared() == 3  # type: ignore[union-attr]
    assert await store(tier, MANY[:1]) == [True]
    assert await present(tier, KEYS) == COUNT - 2, "what was removed does not come back"
    assert len(disk.all_files()) == COUNT - 2 + 1
    assert disk.nbytes() == tier.status().nbytes
    await tier.close()


async def test_a_clear_is_not_repeated_after_a_restart(disk: DiskHarness) -> None:
    tier = await disk.open()
    assert all(await store(tier, KEYS[:1]))
    await tier.clear(None, 5)
    await tier.clear(99, 7)
    assert tier.settled
    assert all(await store(tier, KEYS))
    await tier.close()
    tier = await disk.open()
    await tier.clear(None, 7)
    assert await present(tier, KEYS) == COUNT
    await tier.clear(None, 8)
    assert await present(tier, KEYS) == 0
    await tier.close()


async def test_a_clear_while_there_is_no_disk_is_done_when_it_comes(disk: DiskHarness) -> None:
    tier = await disk.open()
    assert all(await store(tier, KEYS[:2]))
    assert await store(tier, KEYS[2:3], space=99) == [True]
    await tier.close()
    elsewhere, mounted = disk.path.with_name("elsewhere"), disk.path.with_name("mounted")
    disk.path.rename(elsewhere)
    disk.path.symlink_to(mounted)
    tier = await disk.open()
    await tier.clear(99, 5)
    assert not tier.settled
    elsewhere.rename(mounted)
    await until(lambda: tier.settled)
    assert (await tier.lookup(KEYS[:3], 1.0)).tolist() == [True, True, False]
    assert len(disk.all_files()) == 2
    await tier.close()


async def test_a_disk_that_was_elsewhere_meanwhile_has_missed_a_clear(disk: DiskHarness) -> None:
    """It comes back to the same shard, or to the next one, which remembers in memory."""
    mounted, old, copy = (disk.path.with_name(name) for name in ("mounted", "old", "copy"))
    tier = await disk.open()
    assert all(await store(tier, KEYS))
    await tier.close()
    disk.path.rename(old)
    shutil.copytree(old, copy)
    disk.path.symlink_to(mounted)
    mounted.mkdir()
    tier = await disk.open()
    await tier.clear(99, 5)
    assert tier.cleared == 5
    shutil.rmtree(mounted)
    assert await store(tier, KEYS[:1]) == [False]
    copy.rename(mounted)
    await until(lambda: tier.status().problem is None and tier.settled)
    assert await present(tier, KEYS) == 0
    await tier.close()
    shutil.rmtree(mounted)
    old.rename(mounted)
    tier = await disk.open()
    assert await present(tier, KEYS) == COUNT
    await tier.clear(None, 5)
    assert await present(tier, KEYS) == 0
    await tier.close()


async def test_a_clear_is_over_when_no_file_of_it_is_left(
    disk: DiskHarness, monkeypatch: Any
) -> None:
    monkeypatch.setattr("lmkv_ray.tiers.disk.tier.CLEAR_SECONDS", 0.05)
    tier = await disk.open()
    release = disk.hold_writes()
    storing = asyncio.create_task(store(tier, KEYS[:2]))
    await until(lambda: tier.status().nbytes > 0)
    await tier.clear(None, 5)
    assert not tier.settled, "what is being written may still appear"
    release()
    await storing
    await until(lambda: tier.settled)
    assert not disk.all_files()
    assert all(await store(tier, KEYS))

    def refuse(self: Directory, path: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Directory, "unlink", refuse)
        await tier.clear(None, 6)
        await tier.clear(99, 7)
        assert not tier.settled
        assert await present(tier, KEYS) == 0
    await until(lambda: tier.settled)
    assert tier.status().nbytes == 0
    await tier.close()
    again = await disk.open()
    assert await present(again, KEYS) == 0
    await again.close()


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
    go_on, scan = threading.Event(), Directory.scan

    def slow_scan(self: Directory, *args: Any) -> Any:
        go_on.wait()
        return scan(self, *args)

    monkeypatch.setattr(Directory, "scan", slow_scan)
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


async def test_pins_and_removals_survive_a_remount(disk: DiskHarness) -> None:
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
    monkeypatch.setattr(reading, "SLOW_SECONDS", 0.05)
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


async def test_closing_abandons_what_waits(disk: DiskHarness) -> None:
    tier = await disk.open(threads=2)
    release = disk.hold_writes()
    storing = asyncio.create_task(store(tier, KEYS))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    closing = asyncio.create_task(tier.close())
    await asyncio.sleep(0)
    release()
    await closing
    assert sum(await storing) <= 2, "one of each thread"
    assert await store(tier, KEYS) == [False] * COUNT
    assert not any(o.ok for o in await fetch(tier, KEYS, slots(COUNT)))
    again = await disk.open()
    assert await present(again, KEYS) == sum(storing.result())
    assert len(disk.all_files()) == sum(storing.result())
    await again.close()


async def test_empty_chunks_are_not_stored(disk: DiskHarness) -> None:
    tier = await disk.open()
    one = chunk(KEYS[0].tobytes())
    assert await tier.store([type(one)(one.key, 0, one.data[:0], one.intact)]) == [False]
    await tier.close()
