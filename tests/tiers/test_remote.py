"""The remote tier over a real S3 server, a directory, and a store that fails and lies."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmkv_ray.clock import SYSTEM_CLOCK, SystemClock
from lmkv_ray.errors import ConfigError
from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.keys import key_array
from lmkv_ray.tiers import TierChunk
from lmkv_ray.tiers.clears import Unheard
from lmkv_ray.tiers.format import ChunkHeader, Label
from lmkv_ray.tiers.remote import RemoteTier
from lmkv_ray.tiers.remote import tier as remote
from lmkv_ray.tiers.remote.objects import Objects, open_objects
from lmkv_ray.tiers.remote.recent import Recent, Stored
from lmkv_ray.tiers.remote.turns import Turns
from tests.tiers.harness import secret, until
from tests.tiers.s3 import options, s3_server

NBYTES = 100_000
SPACE = 7
KEYS = [np.random.default_rng(i).bytes(16) for i in range(12)]


def data_of(key: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(np.random.default_rng(list(key)).bytes(NBYTES), np.uint8)


def chunk(key: bytes, *, space: int = SPACE, intact: bool = True) -> TierChunk:
    return TierChunk(key, space, data_of(key), lambda: intact)


async def fetched(tier: RemoteTier, keys: list[bytes], within: float = 10) -> dict[int, Outcome]:
    slots = [np.zeros(NBYTES + 500, np.uint8) for _ in keys]
    outcomes = {o.position: o async for o in tier.fetch(Fetch(key_array(keys), slots, within))}
    for position, outcome in outcomes.items():
        if outcome.ok:
            assert outcome.nbytes == NBYTES
            assert (slots[position][:NBYTES] == data_of(keys[position])).all()
    assert sorted(outcomes) == list(range(len(keys)))
    return outcomes


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        objects = open_objects("s3://lmkv-bucket", options(address))
        asyncio.run(objects.put("made", [b"1"], 10))
        yield address


@pytest.fixture(params=["s3", "directory", "encrypted"])
def where(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[str, dict[str, str], Path | None]:
    if request.param == "s3":
        # One bucket: this server reserves a volume of disk space for each.
        url = f"s3://lmkv-bucket/{tmp_path.name}"
        return url, options(request.getfixturevalue("s3")), None
    key_file = None
    if request.param == "encrypted":
        key_file = secret(tmp_path / "key", "0123456789abcdef" * 4)
    return f"file://{tmp_path}/store", {}, key_file


async def open_tier(where: tuple[str, dict[str, str], Path | None]) -> RemoteTier:
    return await RemoteTier.open(where[0], where[1], clock=SYSTEM_CLOCK, key_file=where[2])


async def test_what_one_node_stores_all_can_fetch(where: Any) -> None:
    here, there = await open_tier(where), await open_tier(where)
    assert not (await there.lookup(key_array(KEYS[:1]), 5)).any()
    assert await here.store([chunk(key) for key in KEYS[:8]]) == [True] * 8
    assert await there.store([chunk(KEYS[3])]) == [True]
    assert there.status().counters["store_known"] == 1
    assert (await there.lookup(key_array(KEYS[1:]), 5)).tolist() == [True] * 7 + [False] * 4
    outcomes = await fetched(there, KEYS[:9])
    assert all(outcomes[i].ok for i in range(8))
    assert outcomes[8].failure is Failure.MISSING
    assert there.status().problem is None
    await here._objects.delete(here._name(KEYS[0]), 10)
    assert (await fetched(there, KEYS[:1]))[0].failure is Failure.MISSING


async def test_a_chunk_that_changed_is_not_stored(where: Any) -> None:
    tier = await open_tier(where)
    assert await tier.store([chunk(KEYS[0], intact=False)]) == [False]
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.MISSING


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


async def test_wrong_credentials_are_one_clear_error(
    s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    tier = await RemoteTier.open(
        "s3://lmkv-wrong/x", options(s3, secret="wrong"), clock=SYSTEM_CLOCK
    )
    with caplog.at_level(logging.WARNING):
        assert await tier.store([chunk(key) for key in KEYS]) == [False] * len(KEYS)
        assert not (await tier.lookup(key_array(KEYS), 5)).any()
        assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.LOST
    problem = tier.status().problem
    assert problem is not None
    assert "credentials" in problem
    assert sum("credentials" in record.message for record in caplog.records) == 1


async def test_a_store_that_is_down_costs_no_waiting_and_comes_back(tmp_path: Path) -> None:
    tier = await RemoteTier.open(
        "s3://lmkv-down/x", options("http://127.0.0.1:9"), clock=SYSTEM_CLOCK
    )
    assert not (await tier.lookup(key_array(KEYS), 5)).any()
    assert tier.status().problem is not None
    began = time.monotonic()
    for _ in range(100):
        assert not (await tier.lookup(key_array(KEYS), 5)).any()
    assert time.monotonic() - began < 5
    assert tier.status().counters["asked"] <= len(KEYS) * 2


@pytest.mark.parametrize("url", ["nonsense", "s3://", "ftp://x/y"])
async def test_a_wrong_url_is_said_at_start(url: str) -> None:
    with pytest.raises(ConfigError, match="LMKV_REMOTE_URL"):
        await RemoteTier.open(url, {}, clock=SYSTEM_CLOCK)


class FaultyObjects(Objects):
    """Answers late, with an error, or with other bytes than were stored."""

    def __init__(self, directory: Path) -> None:
        self._inner = open_objects(f"file://{directory}", {})
        super().__init__(self._inner._store)
        self.hang = False
        self.down = False
        self.sending = asyncio.Event()
        """Set when a chunk is sent; it arrives when ``sent`` is set."""
        self.sent = asyncio.Event()
        self.sent.set()
        self.error: Exception | None = None
        self.lie: Any = None

    async def put(self, name: str, parts: list[Any], within: float) -> None:
        if self.down:
            raise OSError("connection refused")
        if name.startswith("chunks/"):
            self.sending.set()
            await self.sent.wait()
        await super().put(name, parts, within)

    async def listed(self, prefix: str, within: float) -> list[str]:
        if self.down:
            raise OSError("connection refused")
        return await super().listed(prefix, within)

    async def get(self, name: str, most: int, within: float) -> Any:
        async with asyncio.timeout(within):
            if self.hang:
                await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        data = await super().get(name, most, within)
        return self.lie(bytes(data)) if self.lie else data


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyObjects:
    return FaultyObjects(tmp_path)


@pytest.mark.parametrize(
    "lie",
    [
        lambda b: b[:-1],
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:],
        lambda b: bytes([b[20] ^ 1]).join([b[:20], b[21:]]),
        lambda b: b + b"x",
    ],
)
async def test_a_lying_store_is_never_believed(faulty: FaultyObjects, lie: Any) -> None:
    tier = RemoteTier(faulty, None, SYSTEM_CLOCK)
    await tier.store([chunk(KEYS[0]), chunk(KEYS[1])])
    faulty.lie = lie
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.CORRUPT
    faulty.lie = None
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.MISSING  # removed
    assert (await fetched(tier, KEYS[1:2]))[0].ok


async def test_another_chunks_bytes_are_not_believed(faulty: FaultyObjects) -> None:
    tier = RemoteTier(faulty, None, SYSTEM_CLOCK)
    await tier.store([chunk(KEYS[0]), chunk(KEYS[1])])
    other = await faulty.get(f"chunks/{KEYS[1].hex()[:2]}/{KEYS[1].hex()}.plain1", 1 << 20, 5)
    faulty.lie = lambda _: bytes(other)
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.CORRUPT


async def test_a_slow_store_keeps_the_deadline(faulty: FaultyObjects) -> None:
    tier = RemoteTier(faulty, None, SYSTEM_CLOCK)
    await tier.store([chunk(key) for key in KEYS])
    faulty.hang = True
    began = time.monotonic()
    outcomes = await fetched(tier, KEYS, within=0.2)
    assert {o.failure for o in outcomes.values()} == {Failure.LATE}
    assert tier.status().problem is None  # it was not given much time
    outcomes = await fetched(tier, KEYS, within=1.2)
    assert Failure.LATE in {o.failure for o in outcomes.values()}
    assert time.monotonic() - began < 10
    assert "in time" in str(tier.status().problem)


async def test_a_failing_store_recovers(faulty: FaultyObjects) -> None:
    tier = RemoteTier(faulty, None, SYSTEM_CLOCK)
    await tier.store([chunk(KEYS[0])])
    faulty.error = OSError("connection reset")
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.LOST
    assert tier.status().problem is not None
    faulty.error = None
    tier._try._breaker._until = 0
    assert (await fetched(tier, KEYS[:1]))[0].ok
    assert tier.status().problem is None


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


async def test_another_master_key_reads_nothing_and_removes_nothing(tmp_path: Path) -> None:
    tiers = []
    for name in "ab":
        key_file = secret(tmp_path / name, name * 64)
        tiers.append(await open_tier((f"file://{tmp_path}/store", {}, key_file)))
    plain = await open_tier((f"file://{tmp_path}/store", {}, None))
    await tiers[0].store([chunk(KEYS[0])])
    for stranger in (tiers[1], plain):
        assert (await fetched(stranger, KEYS[:1]))[0].failure is Failure.MISSING
    assert (await fetched(tiers[0], KEYS[:1]))[0].ok


async def test_a_closed_fetch_writes_nothing_more(faulty: FaultyObjects) -> None:
    tier = RemoteTier(faulty, None, SYSTEM_CLOCK)
    await tier.store([chunk(key) for key in KEYS])
    slots = [np.zeros(NBYTES, np.uint8) for _ in KEYS]
    fetch = tier.fetch(Fetch(key_array(KEYS), slots, 10))
    await anext(fetch)
    await fetch.aclose()
    before = [slot.copy() for slot in slots]
    await asyncio.gather(*(tier._try(faulty.get("x", 1, 1)) for _ in range(20)))
    assert all((a == b).all() for a, b in zip(before, slots, strict=True))
    assert len(asyncio.all_tasks()) == 1


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


async def test_an_object_of_any_size_under_a_chunks_name_is_not_read(where: Any) -> None:
    tier = await open_tier(where)
    assert await tier.store([chunk(KEYS[0]), chunk(KEYS[1])]) == [True, True]
    objects = tier._objects
    for key, size in ((KEYS[0], 3 << 20), (KEYS[1], 0)):
        await objects.put(tier._name(key), [bytes(size)], 10)
    read: list[int] = []

    class Watched:
        """The store, of which it is noted how much is read."""

        def __init__(self, store: Any) -> None:
            self.store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self.store, name)

        async def get_async(self, path: str, **more: Any) -> Any:
            result = await self.store.get_async(path, **more)
            read.append(result.range[1] - result.range[0])
            return result

    outcomes = await fetched(tier, KEYS[:2])
    assert outcomes[0].failure is Failure.TOO_LARGE
    assert outcomes[1].failure is Failure.CORRUPT
    assert tier.status().counters["read_too_large"] == 1
    fresh = await open_tier(where)
    fresh._objects._store = Watched(fresh._objects._store)
    for key in KEYS[:2]:
        assert not (await fresh.lookup(key_array([key]), 5)).any()
    assert max(read) <= 4096
    assert fresh.status().problem is None
    assert await fresh.store([chunk(KEYS[0]), chunk(KEYS[1])]) == [True, True]
    assert all(o.ok for o in (await fetched(fresh, KEYS[:2])).values()), "put in its place"


class CountingObjects(Objects):
    """An empty store that answers one turn of the event loop later, and counts."""

    def __init__(self, directory: Path) -> None:
        super().__init__(open_objects(f"file://{directory}", {})._store)
        self.asked: list[str] = []
        self.held: set[str] = set()

    async def listed(self, prefix: str, within: float) -> list[str]:
        return []

    async def beginning(self, name: str, nbytes: int, within: float) -> tuple[bytes, int] | None:
        self.asked.append(name)
        await asyncio.sleep(0)
        key = bytes.fromhex(name.split("/")[-1].split(".")[0])
        if name not in self.held:
            return None
        return ChunkHeader(Label(key, SPACE, NBYTES), 0, 1, bytes(12)).pack(), 4096 + NBYTES


MANY = [i.to_bytes(16, "little") for i in range(3125)]


async def test_a_prompt_whose_first_chunk_is_missing_asks_once(tmp_path: Path) -> None:
    objects = CountingObjects(tmp_path)
    tier = RemoteTier(objects, None, SYSTEM_CLOCK)
    for _ in range(3):
        assert not (await tier.lookup(key_array(MANY), 5)).any()
    assert len(objects.asked) == 1, "and what is known to be missing is not asked again at once"
    objects.held = {tier._name(key) for key in MANY[1:1501]}
    assert (await tier.lookup(key_array(MANY[1:]), 5)).sum() == 1500
    assert 1500 < len(objects.asked) <= 1500 + 2 + remote.WIDEST_STEP


async def test_requests_take_turns(tmp_path: Path) -> None:
    objects = CountingObjects(tmp_path)
    tier = RemoteTier(objects, None, SYSTEM_CLOCK)
    objects.held = {tier._name(key) for key in MANY}
    long = asyncio.create_task(tier.lookup(key_array(MANY[100:]), 60))
    await until(lambda: len(objects.asked) > 1000)
    before = len(objects.asked)
    assert (await tier.lookup(key_array(MANY[:4]), 60)).all()
    # Three steps, each of which waits for a few of those that are inside, not for all that wait.
    assert len(objects.asked) - before < 3 * 4 * remote.IN_FLIGHT
    assert (await long).all()


async def test_turns_are_given_back_by_those_who_do_not_want_them_any_more() -> None:
    turns, order, gate = Turns(1), [], asyncio.Event()

    async def use(request: object, name: str) -> None:
        async with turns.turn(request):
            order.append(name)
            await gate.wait()

    a, b = object(), object()
    tasks = [asyncio.create_task(use(r, n)) for r, n in ((a, "a1"), (a, "a2"), (a, "a3"), (b, "b"))]
    await until(lambda: order == ["a1"])
    tasks[1].cancel()
    gate.set()
    await asyncio.wait(tasks)
    assert order == ["a1", "b", "a3"]
    tasks = [asyncio.create_task(use(a, "again")) for _ in range(2)]
    await asyncio.wait(tasks)
    assert order[-2:] == ["again", "again"]


def test_what_was_missing_is_asked_again_after_a_while() -> None:
    now = [0.0]

    class Stopped(SystemClock):
        def monotonic(self) -> float:
            return now[0]

    recent = Recent(Stopped())
    recent.put(KEYS[0], None)
    recent.put(KEYS[1], Stored(SPACE, 0))
    now[0] = 9.0
    assert recent.get(KEYS[0]) is not None
    now[0] = 11.0
    assert recent.get(KEYS[0]) is None
    assert recent.get(KEYS[1]) is not None


async def test_nothing_readable_is_in_the_store(tmp_path: Path) -> None:
    key_file = secret(tmp_path / "key", "0123456789abcdef" * 4)
    for key in (None, key_file):
        store = f"{tmp_path}/store-{key is None}"
        tier = await open_tier((f"file://{store}", {}, key))
        assert await tier.store([chunk(KEYS[0])]) == [True]
        [file] = list_files(Path(store))
        plain = data_of(KEYS[0])[5000:5064].tobytes()
        assert (plain in file.read_bytes()) == (key is None), "the test would see it"


def list_files(path: Path) -> list[Path]:
    return list(path.glob("chunks/*/*"))


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
