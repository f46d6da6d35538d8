"""What was cleared stays away, whatever the disk does meanwhile."""

from __future__ import annotations

import asyncio
import errno
import shutil
from typing import Any

from lmkv_ray.tiers.disk.local import LocalTree
from tests.tiers.disk.conftest import present
from tests.tiers.harness import COUNT, DiskHarness, some_keys, store, until

KEYS = some_keys()


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

    def refuse(self: LocalTree, path: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(LocalTree, "remove", refuse)
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
