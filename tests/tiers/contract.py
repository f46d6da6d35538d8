"""What every tier must do, as one class of tests: see ``TierContract``."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest

from lmkv_ray.arena import checksum
from lmkv_ray.fetch import Failure, Fetch
from lmkv_ray.keys import key_list
from lmkv_ray.tiers import Tier
from tests.tiers.harness import (
    COUNT,
    NBYTES,
    SECONDS,
    SLOT,
    Harness,
    arrived,
    chunk,
    content_of,
    fetch,
    slots,
    some_keys,
    store,
    until,
)

KEYS = some_keys()
NAMES = key_list(KEYS)
STRANGERS = some_keys(3, seed=5)


async def found(tier: Tier, keys: np.ndarray = KEYS) -> list[bool]:
    answer: list[bool] = (await tier.lookup(keys, SECONDS)).tolist()
    return answer


class TierContract:
    """Every behaviour, over one kind of tier.

    A new tier is tested by a class ``Test...`` that has this one as its base, and a harness of its
    own (``harness.py``): its medium, and how it is damaged, slowed down and taken away.
    """

    module: ClassVar[ModuleType]
    """Has ``PENDING_BYTES``, the bound of what is being written."""

    def make(self, directory: Path) -> Harness:
        """A harness, in an empty directory."""
        raise NotImplementedError

    @pytest.fixture
    def harness(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
        """A medium with room for a few chunks in flight."""
        monkeypatch.setattr(self.module, "PENDING_BYTES", COUNT * SLOT)
        return self.make(tmp_path)

    @pytest.fixture
    async def tier(self, harness: Harness) -> AsyncIterator[Tier]:
        tier = await harness.open()
        yield tier
        await tier.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    @pytest.fixture
    async def full(self, tier: Tier) -> Tier:
        """A tier with a chunk of each key."""
        assert await store(tier, KEYS) == [True] * COUNT
        return tier

    async def test_what_was_stored_arrives_bit_equal(self, full: Tier) -> None:
        assert await found(full) == [True] * COUNT
        into = slots(COUNT)
        for outcome, slot, key in zip(await fetch(full, KEYS, into), into, KEYS, strict=True):
            assert outcome.ok
            assert outcome.nbytes == NBYTES
            assert outcome.checksum == checksum(content_of(key.tobytes()))
            assert arrived(slot, key)

    @pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, SLOT - 16, SLOT - 15, SLOT])
    async def test_any_size_fits_a_slot_of_just_that_size(self, tier: Tier, nbytes: int) -> None:
        keys = KEYS[:1]
        assert await store(tier, keys, nbytes=nbytes) == [True]
        slot = slots(1)[0]
        (outcome,) = await fetch(tier, keys, [slot[:nbytes]])
        assert outcome.ok
        assert arrived(slot, keys[0], nbytes)

    async def test_memory_may_lie_anywhere(self, tier: Tier) -> None:
        """In an arena it is aligned; but nothing else may depend on it."""
        memory = slots(2, 2 * SLOT)
        data = memory[0][123 : 123 + NBYTES]
        data[:] = content_of(NAMES[0])
        assert await tier.store([dataclasses.replace(chunk(NAMES[0]), data=data)]) == [True]
        into = memory[1][77 : 77 + NBYTES]
        (outcome,) = await fetch(tier, KEYS[:1], [into])
        assert outcome.ok
        assert arrived(into, KEYS[0])

    async def test_a_missing_chunk_is_reported_and_the_others_arrive(self, full: Tier) -> None:
        keys = np.concatenate([STRANGERS[:1], KEYS[:4], STRANGERS[1:], KEYS[4:]])
        strange = [0, 5, 6]
        if full.capabilities.instant:  # the others may stop at the first that is missing
            assert await found(full, keys) == [i not in strange for i in range(len(keys))]
        assert await found(full, keys[1:]) == [i not in strange for i in range(1, 5)] + [
            full.capabilities.instant and i not in strange for i in range(5, len(keys))
        ]
        into = slots(len(keys))
        for outcome in await fetch(full, keys, into):
            position = outcome.position
            assert outcome.failure == (Failure.MISSING if position in strange else None)
            assert outcome.ok == arrived(into[position], keys[position])

    async def test_nothing_wanted(self, tier: Tier) -> None:
        assert await fetch(tier, KEYS[:0], []) == []
        assert await found(tier, KEYS[:0]) == []
        assert await tier.store([]) == []

    async def test_a_chunk_that_changed_while_it_was_written_is_not_found(self, tier: Tier) -> None:
        asked = []

        def changed() -> bool:
            asked.append(1)
            return False

        assert await store(tier, KEYS[:1], intact=changed) == [False]
        assert asked
        assert await found(tier, KEYS[:1]) == [False]
        assert await store(tier, KEYS[:1]) == [True], "it may come again"

    async def test_stored_twice_is_stored(self, full: Tier) -> None:
        assert await store(full, KEYS) == [True] * COUNT
        assert all(outcome.ok for outcome in await fetch(full, KEYS, slots(COUNT)))

    async def test_a_chunk_larger_than_its_slot_is_refused(self, full: Tier) -> None:
        into = slots(COUNT)
        into[3] = slots(1)[0][: NBYTES - 1]
        outcomes = await fetch(full, KEYS, into)
        assert outcomes[3].failure == Failure.TOO_LARGE
        assert all(outcome.ok for outcome in outcomes if outcome.position != 3)

    @pytest.mark.parametrize("how", ["damage", "cut"])
    async def test_what_is_damaged_is_never_served(
        self, harness: Harness, full: Tier, how: str
    ) -> None:
        getattr(harness, how)(NAMES[4])
        into = slots(COUNT)
        outcomes = await fetch(full, KEYS, into)
        assert outcomes[4].failure == Failure.CORRUPT
        assert all(arrived(into[i], KEYS[i]) for i in range(COUNT) if i != 4)
        assert await found(full, KEYS[:4]) == [True] * 4
        assert await found(full, KEYS[4:5]) == [False]
        assert await found(full, KEYS[5:]) == [True] * (COUNT - 5)
        assert (await fetch(full, KEYS[4:5], into))[0].failure == Failure.MISSING
        assert await store(full, KEYS[4:5]) == [True], "and can be stored again"
        assert (await fetch(full, KEYS[4:5], into))[0].ok
        assert full.status().problem is None

    async def test_a_chunk_that_vanished_is_missing(self, harness: Harness, full: Tier) -> None:
        harness.lose(NAMES[2])
        outcomes = await fetch(full, KEYS, slots(COUNT))
        assert outcomes[2].failure == Failure.MISSING
        assert await found(full, KEYS[2:3]) == [False]
        assert await found(full, KEYS[3:]) == [True] * (COUNT - 3)
        assert full.status().problem is None

    async def test_chunks_survive_a_restart(self, harness: Harness, full: Tier) -> None:
        await full.close()
        again = await harness.open()
        into = slots(COUNT)
        assert await found(again) == [True] * COUNT
        assert all(outcome.ok for outcome in await fetch(again, KEYS, into))
        assert all(arrived(slot, key) for slot, key in zip(into, KEYS, strict=True))
        await again.close()

    async def test_a_space_is_cleared_without_the_others(
        self, harness: Harness, full: Tier
    ) -> None:
        assert await store(full, STRANGERS, space=99) == [True] * 3
        await full.clear(99, 0)
        outcomes = await fetch(full, STRANGERS, slots(3))
        assert {outcome.failure for outcome in outcomes} == {Failure.MISSING}
        assert await found(full, STRANGERS) == [False] * 3
        assert await found(full) == [True] * COUNT
        await full.clear(None, 0)
        assert not any(await found(full))
        await full.close()
        again = await harness.open()
        assert not any(await found(again))
        await again.close()

    async def test_what_is_cleared_while_it_is_written_does_not_come_back(
        self, harness: Harness, tier: Tier
    ) -> None:
        release = harness.hold_writes()
        storing = asyncio.create_task(store(tier, KEYS))
        for _ in range(5):  # so far that writes have begun
            await asyncio.sleep(0)
        clearing = asyncio.create_task(tier.clear(None, 0))
        await asyncio.sleep(0)
        release()
        await asyncio.gather(storing, clearing)
        assert not any(await found(tier))
        await tier.close()
        again = await harness.open()
        assert not any(await found(again))
        await again.close()

    async def test_no_time_at_all_is_late(self, full: Tier) -> None:
        outcomes = await fetch(full, KEYS, slots(COUNT), within=0)
        assert {outcome.failure for outcome in outcomes} == {Failure.LATE}

    async def test_a_slow_medium_costs_the_deadline_and_no_more(
        self, harness: Harness, full: Tier
    ) -> None:
        harness.slow_down(0.1)
        keys = np.concatenate([KEYS] * 20)
        into = slots(len(keys))
        begin = time.monotonic()
        outcomes = await fetch(full, keys, into, within=0.5)
        assert time.monotonic() - begin < 0.1 * len(keys) / 4
        failures = [outcome.failure for outcome in outcomes]
        assert set(failures) == {None, Failure.LATE}, "what had arrived is used"
        assert all(arrived(into[o.position], keys[o.position]) for o in outcomes if o.ok)

    async def test_chunks_become_usable_one_by_one(self, full: Tier) -> None:
        keys = np.concatenate([KEYS] * 10)
        into = slots(len(keys))
        async with contextlib.aclosing(full.fetch(Fetch(keys, into, SECONDS))) as outcomes:
            first = await anext(outcomes)
            assert first.ok
            assert arrived(into[first.position], keys[first.position])
            assert not into[-1].any(), "while others are still on their way"

    async def test_a_closed_fetch_writes_no_more(self, full: Tier) -> None:
        keys = np.concatenate([KEYS] * 10)
        into = slots(len(keys))
        stream = full.fetch(Fetch(keys, into, SECONDS))
        await anext(stream)
        await stream.aclose()
        before = [slot.copy() for slot in into]
        assert all(outcome.ok for outcome in await fetch(full, keys, slots(len(keys))))
        assert all((old == new).all() for old, new in zip(before, into, strict=True))

    async def test_a_cancelled_fetch_writes_no_more(self, harness: Harness, full: Tier) -> None:
        harness.slow_down(0.02)
        keys = np.concatenate([KEYS] * 10)
        into = slots(len(keys))
        reading = asyncio.create_task(fetch(full, keys, into))
        await until(lambda: any(slot.any() for slot in into))
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        before = [slot.copy() for slot in into]
        assert all(outcome.ok for outcome in await fetch(full, KEYS, slots(COUNT)))
        assert all((old == new).all() for old, new in zip(before, into, strict=True))

    async def test_without_its_medium_it_is_empty_says_why_and_recovers(
        self, harness: Harness, full: Tier
    ) -> None:
        harness.take_away()
        assert await store(full, STRANGERS) == [False] * 3
        problem = full.status().problem
        assert problem is not None
        assert "Next step" in problem
        assert not any(await found(full))
        outcomes = await fetch(full, KEYS, slots(COUNT))
        assert not any(outcome.ok for outcome in outcomes)
        await full.pin(KEYS[:2], True)
        harness.bring_back()
        await until(lambda: full.status().problem is None)
        assert await store(full, KEYS) == [True] * COUNT
        assert all(outcome.ok for outcome in await fetch(full, KEYS, slots(COUNT)))

    async def test_writes_that_hang_pile_up_to_a_bound(self, harness: Harness, tier: Tier) -> None:
        """What does not fit is refused at once, however many come."""
        release = harness.hold_writes()
        keys = some_keys(5 * COUNT, seed=3)
        storing = asyncio.create_task(store(tier, keys[: 4 * COUNT]))
        await asyncio.sleep(0)
        refused = await asyncio.wait_for(store(tier, keys[4 * COUNT :]), SECONDS)
        assert not any(refused)
        release()
        stored = await storing
        assert any(stored)
        assert not all(stored)

    async def test_status_is_for_people(self, full: Tier) -> None:
        status = full.status()
        assert status.name == full.name
        assert status.problem is None
        assert status.chunks in (-1, COUNT)
        assert status.counters
