"""The remote tier over a simulated bucket, under virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest
from obstore.exceptions import AlreadyExistsError

from lmkv_ray.fetch import Failure
from lmkv_ray.tiers.remote import RemoteTier
from lmkv_ray.tiers.remote.objects import Objects
from tests.simulation.bucket import Bucket, BucketStore
from tests.simulation.loop import VirtualLoop
from tests.simulation.machine import SimulatedClock
from tests.tiers.harness import COUNT, SPACE, arrived, fetch, slots, some_keys, store

KEYS = some_keys()
Open = Callable[[BucketStore], Awaitable[RemoteTier]]
Story = Callable[[Bucket, Open], Awaitable[None]]


def tell(story: Story, seed: int = 0) -> None:
    """Run a story under virtual time."""
    random = Random(seed)
    loop = VirtualLoop(random)

    async def opened(store: BucketStore) -> RemoteTier:
        clock = SimulatedClock(loop, random)  # each node has one of its own
        return await RemoteTier.over(Objects(store), None, clock)

    async def told() -> None:
        await story(Bucket(random), opened)

    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(told())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def served(tier: RemoteTier) -> int:
    """How many chunks arrive; fails if one of them is wrong."""
    into = slots(COUNT)
    outcomes = await fetch(tier, KEYS, into)
    assert all(arrived(into[o.position], KEYS[o.position]) for o in outcomes if o.ok)
    return sum(outcome.ok for outcome in outcomes)


async def well(tier: RemoteTier) -> None:
    """Wait until the tier has no problem, and has carried out what is to be cleared."""
    async with asyncio.timeout(600):
        while not tier.settled or tier.status().problem is not None:  # noqa: ASYNC110
            await asyncio.sleep(1)


def test_what_one_node_stores_another_one_fetches() -> None:
    async def story(bucket: Bucket, opened: Open) -> None:
        here, there = await opened(bucket.store()), await opened(bucket.store())
        assert await store(here, KEYS) == [True] * COUNT
        assert (await there.lookup(KEYS, 5)).all()
        assert await served(there) == COUNT
        assert await store(there, KEYS) == [True] * COUNT
        assert there.status().counters["store_known"] == COUNT

    tell(story)


def test_a_condition_of_a_put_is_kept_and_a_listing_has_pages() -> None:
    async def story(bucket: Bucket, opened: Open) -> None:
        one = bucket.store()
        await one.put_async("a/1", [b"x"], mode="create")
        with pytest.raises(AlreadyExistsError):
            await one.put_async("a/1", [b"y"], mode="create")
        assert bucket.objects == {"a/1": b"x"}
        for i in range(5):
            await one.put_async(f"b/{i}", [b"."])
        pages = [[str(m["path"]) for m in page] async for page in one.list("b/", chunk_size=2)]
        assert pages == [["b/0", "b/1"], ["b/2", "b/3"], ["b/4"]]

    tell(story)


@pytest.mark.parametrize("trouble", ["down", "denied", "cut"])
def test_trouble_is_told_and_over_when_it_is_over(trouble: str) -> None:
    async def story(bucket: Bucket, opened: Open) -> None:
        mine = bucket.store()
        tier = await opened(mine)
        assert all(await store(tier, KEYS))
        setattr(mine if trouble == "cut" else bucket, trouble, True)
        assert await served(tier) == 0
        assert "Next step" in str(tier.status().problem)
        setattr(mine if trouble == "cut" else bucket, trouble, False)
        await well(tier)
        assert await served(tier) == COUNT

    tell(story)


def test_a_request_that_is_never_answered_costs_its_deadline() -> None:
    async def story(bucket: Bucket, opened: Open) -> None:
        tier = await opened(bucket.store())
        assert all(await store(tier, KEYS))
        bucket.hangs = 1.0
        began = asyncio.get_running_loop().time()
        outcomes = await fetch(tier, KEYS, slots(COUNT), within=2.0)
        assert {o.failure for o in outcomes} == {Failure.LATE}
        assert asyncio.get_running_loop().time() - began < 3
        bucket.hangs = 0.0
        await well(tier)
        assert await served(tier) == COUNT

    tell(story)


@pytest.mark.parametrize("seed", range(10))
def test_no_wrong_byte_and_nothing_cleared_from_a_store_that_fails_and_lies(seed: int) -> None:
    async def story(bucket: Bucket, opened: Open) -> None:
        bucket.fails, bucket.hangs, bucket.lies = 0.2, 0.02, 0.1
        here, there = await opened(bucket.store()), await opened(bucket.store())
        await asyncio.gather(store(here, KEYS[::2]), store(there, KEYS[1::2]))
        await asyncio.gather(served(here), served(there))
        storing = asyncio.create_task(store(here, KEYS))
        await asyncio.sleep(bucket.random.uniform(0, 0.2))
        await there.clear(SPACE, 5)
        bucket.fails = bucket.hangs = bucket.lies = 0.0
        await storing
        await well(there)
        await well(here)
        assert await served(there) == 0, "all of it is older than the clear"
        await asyncio.sleep(11)  # the other node looks for news by then
        assert await served(here) == 0
        assert not any(await store(here, KEYS)), "its memory may be older than the clear"
        await here.clear(SPACE, 5)
        assert all(await store(here, KEYS))
        assert await served(there) == COUNT

    tell(story, seed)
