"""How much a disk may take, and what is evicted for it."""

from __future__ import annotations

import asyncio
import os
import shutil

import numpy as np

from tests.tiers.disk.conftest import FILE, Remount, present
from tests.tiers.harness import DiskHarness, fetch, slots, some_keys, store

KEYS = some_keys()
MANY = some_keys(100, seed=1)


async def test_the_budget_holds_at_all_times(tmpfs: tuple[DiskHarness, Remount]) -> None:
    """Also while chunks are written, evicted, cleared and read by several tasks."""
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
            await store(tier, keys, intact=sample, space=part % 2 + 1)
            await fetch(tier, keys, slots(5))
            if task == 2:
                await tier.clear(int(keys[0, 0] % 2) + 1, 0)

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
