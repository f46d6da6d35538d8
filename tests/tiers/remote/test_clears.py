"""Clears of a store that many nodes and clusters share."""

from __future__ import annotations

import asyncio
import math
import os
import time
from pathlib import Path
from typing import Any

from lmkv_ray.clock import SYSTEM_CLOCK, SystemClock
from lmkv_ray.fetch import Failure
from lmkv_ray.keys import key_array
from lmkv_ray.tiers.clears import Unheard
from lmkv_ray.tiers.remote import RemoteTier
from tests.tiers.harness import until
from tests.tiers.remote.store import (
    KEYS,
    SPACE,
    FaultyObjects,
    chunk,
    fetched,
    list_files,
    open_tier,
)


async def test_a_clear_is_for_everybody_and_for_what_was_there(where: Any) -> None:
    here, there, later = [await open_tier(where) for _ in range(3)]
    await here.store([chunk(KEYS[0]), chunk(KEYS[1], space=8)])
    await here.clear(SPACE, 0)
    there._clears._read_at = -math.inf  # it looks for news now and then
    for tier in (here, there):
        outcomes = await fetched(tier, KEYS[:2])
        assert outcomes[0].failure is Failure.MISSING
        assert outcomes[1].ok
    assert await here.store([chunk(KEYS[0])]) == [True], "at once, in place of the old one"
    for tier in (here, there):
        assert (await fetched(tier, KEYS[:1]))[0].ok
    await there.clear(None, 0)
    later._clears._read_at = -math.inf
    assert (await fetched(there, KEYS[1:2]))[0].failure is Failure.MISSING
    assert (await fetched(later, KEYS[1:2]))[0].failure is Failure.MISSING


async def test_a_clear_while_the_store_is_down_is_not_lost(
    faulty: FaultyObjects, tmp_path: Path
) -> None:
    tier, other = (
        RemoteTier(faulty, None, SYSTEM_CLOCK),
        await open_tier((f"file://{tmp_path}", {}, None)),
    )
    await tier.store([chunk(KEYS[0]), chunk(KEYS[1], space=8)])
    faulty.down = True
    await tier.clear(SPACE, 5)
    assert not tier.settled
    assert "What was cleared is not served" in str(tier.status().problem)
    # It may be that only writing fails: nothing of the space is served, whatever can be read.
    tier._try._breaker._until = 0
    faulty.listed = super(FaultyObjects, faulty).listed  # type: ignore[method-assign]
    outcomes = await fetched(tier, KEYS[:2])
    assert outcomes[0].failure is Failure.MISSING
    assert outcomes[1].ok
    assert await tier.store([chunk(KEYS[2])]) == [False]
    faulty.down = False
    await until(lambda: tier.settled)
    assert tier.status().problem is None
    other._clears._read_at = -math.inf
    outcomes = await fetched(other, KEYS[:2])
    assert outcomes[0].failure is Failure.MISSING
    assert outcomes[1].ok
    await tier.close()


async def test_a_clear_is_not_repeated_by_those_who_hear_of_it_later(where: Any) -> None:
    here, there, later = [await open_tier(where) for _ in range(3)]
    await here.store([chunk(KEYS[0])])
    await here.clear(SPACE, 5)
    await here.clear(8, 6)
    await here.clear(SPACE, 7)
    await there.clear(SPACE, 7)
    assert await there.store([chunk(KEYS[0]), chunk(KEYS[1])]) == [True, True]
    for tier in (there, later):
        await tier.clear(SPACE, 7)
        await tier.clear(None, 7)  # whoever does not know what it was clears everything
        assert tier.settled
        assert all(outcome.ok for outcome in (await fetched(tier, KEYS[:2])).values())
    assert len(await here._clears._objects.listed("clears/", 5)) == 2, "one for each space"
    await later.clear(None, 8)
    assert (await fetched(later, KEYS[1:2]))[0].failure is Failure.MISSING
    assert len(await here._clears._objects.listed("clears/", 5)) == 1


async def test_what_is_cleared_while_it_is_sent_does_not_come_back(faulty: FaultyObjects) -> None:
    tier = RemoteTier(faulty, None, SYSTEM_CLOCK)
    faulty.sent.clear()
    storing = asyncio.create_task(tier.store([chunk(KEYS[0])]))
    await until(faulty.sending.is_set)
    clearing = asyncio.create_task(tier.clear(SPACE, 5))
    await until(lambda: tier.settled)
    faulty.sent.set()
    await asyncio.gather(storing, clearing)
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.MISSING


def change_times(path: Path, seconds: float) -> None:
    """As if all chunks had been stored by a clock that is so many seconds ahead."""
    for file in path.glob("store/chunks/*/*"):
        os.utime(file, (time.time() + seconds, time.time() + seconds))


async def test_clears_do_not_compare_clocks(tmp_path: Path) -> None:
    """The clock of the node that stored was ahead: a clear that comes later covers it."""
    where: Any = (f"file://{tmp_path}/store", {}, None)
    here, there = await open_tier(where), await open_tier(where)
    assert await here.store([chunk(KEYS[0]), chunk(KEYS[1], space=8)]) == [True, True]
    change_times(tmp_path, +3600)
    await there.clear(SPACE, 1)
    assert (await fetched(there, KEYS[:1]))[0].failure is Failure.MISSING
    assert (await fetched(there, KEYS[1:2]))[0].ok
    await there.clear(None, 2)
    for tier in (there, await open_tier(where)):
        assert not (await tier.lookup(key_array(KEYS[1:2]), 5)).any()
        assert (await fetched(tier, KEYS[1:2]))[0].failure is Failure.MISSING
    await there.store([chunk(KEYS[0])])
    change_times(tmp_path, -3600)
    assert (await fetched(there, KEYS[:1]))[0].ok, "stored after the clears, whatever clocks say"


async def test_who_has_not_heard_of_a_clear_stores_nothing_that_counts(tmp_path: Path) -> None:
    where: Any = (f"file://{tmp_path}/store", {}, None)
    late, here = await open_tier(where), await open_tier(where)
    assert await late.store([chunk(KEYS[0]), chunk(KEYS[1], space=8)]) == [True, True]
    await here.clear(SPACE, 5)
    # It has not looked: its chunk bears the old mark.
    await late._objects.delete(late._name(KEYS[0]), 10)
    late._recent.forget(KEYS[0])
    assert await late.store([chunk(KEYS[0])]) == [True]
    assert (await fetched(here, KEYS[:1]))[0].failure is Failure.MISSING
    # It has looked, but nobody has told it to clear its memory.
    late._clears._read_at = -math.inf
    assert (await late.lookup(key_array(KEYS[2:3]), 5)).tolist() == [False]
    assert late.unheard == [Unheard(SPACE, 5, before=False)]
    assert await late.store([chunk(KEYS[2]), chunk(KEYS[3], space=8)]) == [False, True]
    await late.clear(SPACE, 5)
    assert late.unheard == []
    assert await late.store([chunk(KEYS[2])]) == [True]
    assert (await fetched(here, KEYS[2:3]))[0].ok
    assert await late.lookup(key_array(KEYS[1:2]), 5)


class Chance(SystemClock):
    """A clock whose random bytes are always the same."""

    def __init__(self, chance: bytes) -> None:
        self.chance = chance

    def random_bytes(self, count: int) -> bytes:
        return self.chance[:count]


async def test_of_clears_at_one_time_both_are_obeyed(faulty: FaultyObjects, tmp_path: Path) -> None:
    """One takes the same turn as another, and loses: it takes the next one."""
    tier = RemoteTier(faulty, None, Chance(b"\4" + bytes(7)))
    url = f"file://{tmp_path}"
    other = await RemoteTier.open(url, {}, clock=Chance(b"\xff" * 8))
    put, names = faulty.put, []

    async def slow_put(name: str, parts: list[Any], within: float) -> None:
        if name.startswith("clears/"):
            names.append(name)
            if len(names) == 1:
                # Meanwhile another one clears with a greater id, and stores a chunk.
                await other.clear(SPACE, 1)
                assert await other.store([chunk(KEYS[0])]) == [True]
        await put(name, parts, within)

    faulty.put = slow_put  # type: ignore[method-assign]
    await tier.clear(SPACE, 2)
    assert tier.settled
    assert len(names) == 2
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.MISSING
    assert await faulty.listed("clears/", 5) == [names[1]]
    await tier.close()


async def test_a_listing_that_lacks_a_clear_does_not_bring_back_what_was_cleared(
    faulty: FaultyObjects, tmp_path: Path
) -> None:
    """A replica that is behind, or objects that were removed by hand."""
    tier = RemoteTier(faulty, None, SYSTEM_CLOCK)
    other = await RemoteTier.open(f"file://{tmp_path}", {}, clock=SYSTEM_CLOCK)
    await tier.store([chunk(KEYS[0]), chunk(KEYS[1], space=8)])
    files = {path: path.read_bytes() for path in list_files(tmp_path)}
    await tier.clear(None, 1)
    await other.clear(SPACE, 2)
    tier._clears._read_at = -math.inf
    await tier.clear(SPACE, 2)
    lists, shown = faulty.listed, 0

    async def listed(prefix: str, within: float) -> list[str]:
        return (await lists(prefix, within))[:shown]

    faulty.listed = listed  # type: ignore[method-assign]
    for shown in (0, 1, 2, 0):
        for path, data in files.items():  # put back by somebody, or not removed there yet
            path.write_bytes(data)
        tier._clears._read_at = -math.inf
        outcomes = await fetched(tier, KEYS[:2])
        assert {o.failure for o in outcomes.values()} == {Failure.MISSING}, shown
    faulty.listed = lists  # type: ignore[method-assign]
    # A later clear of everything takes the place of both, here and there.
    await other.clear(None, 3)
    for one in (tier, other):
        one._clears._read_at = -math.inf
        await one.clear(None, 3)
    assert await tier.store([chunk(KEYS[0])]) == [True]
    assert (await fetched(other, KEYS[:1]))[0].ok, "both have the same marks"
    assert len(tier._clears._known) == len(other._clears._known) == 1
    await tier.close()


async def test_a_listing_that_shows_no_clear_gets_one_object_for_each_attempt(
    faulty: FaultyObjects,
) -> None:
    tier = RemoteTier(faulty, None, SYSTEM_CLOCK)
    await tier.store([chunk(KEYS[0])])

    lists, asked = faulty.listed, 0

    async def listed(prefix: str, within: float) -> list[str]:
        nonlocal asked
        asked += 1
        return []

    faulty.listed = listed  # type: ignore[method-assign]
    await tier.clear(None, 1)
    assert not tier.settled
    assert (await fetched(tier, KEYS[:1]))[0].failure is not None
    await tier.close()
    assert len(await lists("clears/", 5)) <= asked / 2, "an attempt asks before and after"


async def test_who_was_away_stores_nothing_before_it_knows_what_was_cleared(tmp_path: Path) -> None:
    """What is in its memory or on its disk may be older than a clear that it never saw."""
    where: Any = (f"file://{tmp_path}/store", {}, None)
    here = await open_tier(where)
    await here.clear(SPACE, 5)
    back = await open_tier(where)
    assert back.unheard == [Unheard(SPACE, 5, before=True)]
    assert await back.store([chunk(KEYS[0]), chunk(KEYS[1], space=8)]) == [False, True]
    back.heard(back.unheard[0])
    assert await back.store([chunk(KEYS[0])]) == [True]
    await here.clear(None, 0)
    assert here.unheard == [], "its own is no news, with or without a number"
