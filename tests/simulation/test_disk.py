"""The disk tier on a simulated disk, under virtual time; and that this disk fails as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest

from lmkv_ray.fetch import Failure
from lmkv_ray.policies import LRU
from lmkv_ray.tiers.disk import DiskTier
from tests.simulation.disk import SimulatedDisk
from tests.simulation.loop import VirtualLoop
from tests.simulation.machine import SimulatedClock
from tests.tiers.harness import COUNT, arrived, chunk, fetch, slots, some_keys, store

KEYS = some_keys()
FOLDER = Path("/simulated")
Story = Callable[[SimulatedDisk], Awaitable[None]]


def tell(story: Story, seed: int = 0) -> float:
    """Run a story under virtual time; how many seconds it took."""
    random = Random(seed)
    loop = VirtualLoop(random)
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(story(SimulatedDisk(SimulatedClock(loop, random), random)))
        return loop.time()
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def open_tier(disk: SimulatedDisk, capacity: int = 64 << 20) -> DiskTier:
    return await DiskTier.open(FOLDER, capacity, make_policy=LRU, clock=disk.clock, medium=disk)


async def served(tier: DiskTier) -> int:
    """How many chunks arrive; fails if one of them is wrong."""
    into = slots(COUNT)
    outcomes = await fetch(tier, KEYS, into)
    assert all(arrived(into[o.position], KEYS[o.position]) for o in outcomes if o.ok)
    return sum(outcome.ok for outcome in outcomes)


async def well(tier: DiskTier) -> None:
    """Wait until the tier has no problem."""
    async with asyncio.timeout(300):
        while tier.status().problem is not None:  # noqa: ASYNC110 (of virtual time)
            await asyncio.sleep(1)


def test_what_was_stored_arrives_and_is_there_for_the_next_process() -> None:
    async def story(disk: SimulatedDisk) -> None:
        tier = await open_tier(disk)
        assert await store(tier, KEYS) == [True] * COUNT
        assert await served(tier) == COUNT
        assert disk.used > COUNT * 60_000
        await tier.close()
        again = await open_tier(disk)
        assert await served(again) == COUNT
        disk.kill()
        third = await open_tier(disk)
        assert await served(third) == COUNT, "what was written survives the process"
        await third.close()

    tell(story)


def test_time_is_virtual_and_a_seed_replays_exactly() -> None:
    async def story(disk: SimulatedDisk) -> None:
        disk.pace = 60.0
        tier = await open_tier(disk)
        await well(tier)
        assert any(await store(tier, KEYS))
        await tier.close()

    assert tell(story, 1) == tell(story, 1) != tell(story, 2)
    assert tell(story, 1) > 100


@pytest.mark.parametrize("trouble", ["read_only", "broken", "gone"])
def test_trouble_is_told_and_over_when_the_disk_is_well_again(trouble: str) -> None:
    async def story(disk: SimulatedDisk) -> None:
        tier = await open_tier(disk)
        assert all(await store(tier, KEYS))
        setattr(disk, trouble, True)
        assert not any(await store(tier, some_keys(2, seed=3)))
        assert tier.status().problem is not None
        assert await served(tier) == (COUNT if trouble == "read_only" else 0)
        setattr(disk, trouble, False)
        await well(tier)
        assert await served(tier) == COUNT
        await tier.close()

    tell(story)


def test_a_full_disk_makes_room() -> None:
    async def story(disk: SimulatedDisk) -> None:
        disk.capacity = 6 * (68 << 10)
        tier = await open_tier(disk)
        stored = [ok for key in KEYS for ok in await store(tier, key[None])]
        assert any(stored)
        assert not all(stored)
        assert "full" in str(tier.status().problem)
        assert await served(tier) > 0
        await well(tier)
        assert await store(tier, KEYS[-1:]) == [True]
        assert disk.used <= disk.capacity
        await tier.close()

    tell(story)


def test_a_disk_that_is_stuck_costs_the_deadline() -> None:
    async def story(disk: SimulatedDisk) -> None:
        tier = await open_tier(disk)
        assert all(await store(tier, KEYS))
        disk.stuck = True
        reading = asyncio.create_task(fetch(tier, KEYS, slots(COUNT), within=3.0))
        await asyncio.sleep(4)
        assert "slow" in str(tier.status().problem)
        assert not reading.done(), "what the disk is at is not given away"
        disk.unstick()
        assert {o.failure for o in await reading} <= {None, Failure.LATE}
        await well(tier)
        assert await served(tier) == COUNT
        await tier.close()

    tell(story)


def test_a_disk_that_lies_is_not_believed() -> None:
    async def story(disk: SimulatedDisk) -> None:
        tier = await open_tier(disk)
        assert all(await store(tier, KEYS))
        disk.lies = 0.3
        outcomes = await fetch(tier, KEYS, into := slots(COUNT))
        assert {o.failure for o in outcomes} == {None, Failure.CORRUPT}
        assert all(arrived(into[o.position], KEYS[o.position]) for o in outcomes if o.ok)
        disk.lies = 0.0
        await tier.close()

    tell(story)


@pytest.mark.parametrize("seed", range(8))
def test_no_wrong_byte_is_served_after_a_crash(seed: int) -> None:
    async def story(disk: SimulatedDisk) -> None:
        tier = await open_tier(disk)
        assert all(await store(tier, KEYS[:4]))
        disk.sync()
        writing = asyncio.create_task(store(tier, KEYS[4:]))
        await asyncio.sleep(disk.random.uniform(0, 0.01))
        (disk.kill if seed % 3 == 0 else disk.crash)()
        writing.cancel()
        again = await open_tier(disk)
        count = await served(again)
        assert count >= 4, "what was synced"
        assert await served(again) == count, "what is corrupt was removed"
        assert await store(again, KEYS) == [True] * COUNT
        assert await served(again) == COUNT
        await again.close()

    tell(story, seed)


def test_a_clear_that_counts_as_carried_out_is_not_undone_by_a_crash() -> None:
    noted = []

    async def story(disk: SimulatedDisk) -> None:
        tier = await open_tier(disk)
        assert all(await store(tier, KEYS[:3]))
        disk.sync()
        clearing = asyncio.create_task(tier.clear(None, 5))
        await asyncio.sleep(disk.random.uniform(0, 0.01))
        disk.crash()
        clearing.cancel()
        again = await open_tier(disk)
        noted.append(again.cleared)
        assert again.cleared == 0 or await served(again) == 0
        await again.clear(None, 5)
        assert await served(again) == 0
        await again.close()

    for seed in range(40):
        tell(story, seed)
    assert set(noted) == {0, 5}


def test_a_slot_that_changes_while_it_is_written_is_noticed() -> None:
    async def story(disk: SimulatedDisk) -> None:
        tier = await open_tier(disk)
        changed = False
        name = KEYS[0].tobytes()
        storing = asyncio.create_task(tier.store([chunk(name, intact=lambda: not changed)]))
        await asyncio.sleep(0)
        changed = True
        assert await storing == [False]
        await tier.close()

    tell(story)


def test_after_a_crash_the_folder_is_still_taken_for_ours() -> None:
    async def story(disk: SimulatedDisk) -> None:
        tier = await open_tier(disk)
        await store(tier, KEYS)
        disk.crash()
        await well(await open_tier(disk))

    for seed in range(20):
        tell(story, seed)


def test_a_damaged_number_of_a_clear_is_no_number() -> None:
    """A wrong one that is higher would keep later clears from being carried out."""

    async def story(disk: SimulatedDisk) -> None:
        tier = await open_tier(disk)
        await tier.clear(None, 1234)
        await well(tier)
        assert tier.cleared == 1234
        await tier.close()
        content = disk.content(FOLDER, "CLEARED")
        for position in range(len(content)):
            content[position] ^= 1
            tier = await open_tier(disk)
            assert tier.cleared == 0
            await tier.close()
            content[position] ^= 1

    tell(story)
