"""READs of a peer's tables by ourselves: when its actor is asked, and when it need not be."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from lmkv_ray.arena import checksum, this_process
from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import MissReason
from lmkv_ray.transports.nixl import attention
from lmkv_ray.transports.nixl.wire import Register
from tests.transports.harness import CHUNK, COUNT, Here, Store, content_of, some_keys

KEYS = some_keys()
OTHERS = some_keys(seed=2)
SECONDS = 60.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def here() -> AsyncIterator[Here]:
    here = Here()
    yield here
    await here.close()


@pytest_asyncio.fixture(loop_scope="module")
async def store(here: Here, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    """A peer whose tables are known, and all whose checksums are."""
    for name in ("SLOW_SECONDS", "FAR_SECONDS"):  # however busy the machine is
        monkeypatch.setattr(attention, name, SECONDS)
    store = Store()
    for helper in (store.helper, here.helper):
        await helper.call(Register(extents=[]), time.monotonic() + SECONDS)
    await _fetch(here, store, KEYS)
    assert store.calls > 0
    assert store.reader.checksums(store.slots).all()
    store.calls = 0
    yield store
    await store.close()


async def _fetch(
    here: Here, store: Store, keys: KeyArray, within: float = SECONDS
) -> list[Outcome]:
    wish = Fetch(keys, here.places(len(keys)), within)
    outcomes = [outcome async for outcome in here.transport.fetch(store.info(), wish)]
    for outcome in outcomes:
        landed = here.writer.payload(here.slots[outcome.position])[: CHUNK - 4096]
        assert outcome.ok == bool((landed == content_of(keys[outcome.position])).all())
    return sorted(outcomes, key=lambda outcome: outcome.position)


def failures(outcomes: list[Outcome]) -> list[Failure | None]:
    return [outcome.failure for outcome in outcomes]


async def test_a_busy_peer_is_read_from_all_the_same(here: Here, store: Store) -> None:
    store.set_mood("hang")
    outcomes = await _fetch(here, store, KEYS)
    assert failures(outcomes) == [None] * COUNT
    assert [o.checksum for o in outcomes] == store.reader.checksums(store.slots).tolist()
    assert await _fetch(here, store, KEYS[:0]) == []
    assert store.calls == 0


async def test_what_has_arrived_is_used_though_its_actor_is_silent(
    here: Here, store: Store
) -> None:
    store.set_mood("hang")
    keys = np.concatenate([KEYS[:9], OTHERS[:1], KEYS[9:]])
    outcomes = await _fetch(here, store, keys, within=1.0)
    assert failures(outcomes) == [None] * 9 + [Failure.LATE] + [None] * (COUNT - 9)


async def test_its_actor_is_asked_about_what_is_not_there(here: Here, store: Store) -> None:
    keys = np.concatenate([KEYS[:3], OTHERS[:2], KEYS[3:5]])
    gone = failures(await _fetch(here, store, keys))
    assert gone == [None] * 3 + [Failure.MISSING] * 2 + [None] * 2
    assert store.calls > 0


async def test_its_actor_is_asked_for_checksums(here: Here, store: Store) -> None:
    store.writer.retire(store.slots, MissReason.EVICTED)
    store.fill(OTHERS)
    assert failures(await _fetch(here, store, OTHERS)) == [None] * COUNT
    asked, store.calls = store.calls, 0
    assert asked > 0
    assert failures(await _fetch(here, store, OTHERS)) == [None] * COUNT
    assert store.calls == 0, "they are noted now"
    assert set(failures(await _fetch(here, store, KEYS))) == {Failure.MISSING}


def publish(store: Store, extent: int, size: int) -> None:
    """Four others, with checksums, in an extent that is cut for this."""
    slots = store.writer.assign_extent(extent, size)[:4]
    store.writer.reserve(slots, this_process())
    contents = [content_of(key) for key in OTHERS[:4]]
    for slot, content in zip(slots.tolist(), contents, strict=True):
        store.writer.payload(slot)[: len(content)] = content
    sums = [checksum(content) for content in contents]
    store.writer.publish(slots, OTHERS[:4], len(contents[0]), 1, sums)


async def test_an_extent_that_is_new(here: Here, store: Store) -> None:
    publish(store, 1, CHUNK)
    assert failures(await _fetch(here, store, OTHERS[:4])) == [None] * 4
    asked, store.calls = store.calls, 0
    assert asked > 0
    assert failures(await _fetch(here, store, OTHERS[:4])) == [None] * 4
    assert store.calls == 0


async def test_an_extent_that_was_cut_anew(here: Here, store: Store) -> None:
    store.writer.retire(store.slots, MissReason.EVICTED)
    publish(store, 0, 2 * CHUNK)
    # Where its tables lead now is wrong, but for the first; its actor knows better.
    told = failures(await _fetch(here, store, OTHERS[:4]))
    assert told == [None] + [Failure.CHANGED] * 3
    store.calls = 0
    assert failures(await _fetch(here, store, OTHERS[:4])) == [None] * 4
    assert store.calls == 0


async def test_damage_is_noticed_and_told_from_eviction(here: Here, store: Store) -> None:
    payload = store.writer.payload(int(store.slots[4]))
    payload[100] ^= 1
    outcomes = await _fetch(here, store, KEYS)
    assert failures(outcomes) == [Failure.CORRUPT if i == 4 else None for i in range(COUNT)]
    assert store.calls > 0


async def test_a_peer_that_sleeps_is_asked_first(
    here: Here, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SLOW_SECONDS", 0.0)
    for awake, asked in ((SECONDS, False), (-SECONDS, True), (SECONDS, False)):
        monkeypatch.setattr(attention, "AWAKE_SECONDS", awake)
        store.calls = 0
        assert failures(await _fetch(here, store, KEYS)) == [None] * COUNT
        assert (store.calls > 0) == asked
    here.transport._attention.clear()
