"""The remote tier over a real S3 server, a directory, and a store that fails and lies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmkv_ray.errors import ConfigError
from lmkv_ray.keys import key_array
from lmkv_ray.tiers import TierChunk
from lmkv_ray.tiers.remote import RemoteTier
from lmkv_ray.tiers.remote.objects import Objects, open_objects
from lmkv_ray.transports import Failure, Fetch, Outcome
from tests.tiers.harness import until
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
        key_file = tmp_path / "key"
        key_file.write_text("0123456789abcdef" * 4)
    return f"file://{tmp_path}/store", {}, key_file


async def open_tier(where: tuple[str, dict[str, str], Path | None]) -> RemoteTier:
    return await RemoteTier.open(where[0], where[1], key_file=where[2])


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
    await here.remove(key_array(KEYS[:1]))
    assert (await fetched(there, KEYS[:1]))[0].failure is Failure.MISSING


async def test_a_chunk_that_changed_is_not_stored(where: Any) -> None:
    tier = await open_tier(where)
    assert await tier.store([chunk(KEYS[0], intact=False)]) == [False]
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.MISSING


async def test_a_clear_is_for_everybody_and_for_what_was_there(where: Any) -> None:
    here, there, later = [await open_tier(where) for _ in range(3)]
    await here.store([chunk(KEYS[0]), chunk(KEYS[1], space=8)])
    await here.clear(SPACE, 0)
    for tier in (here, there):
        outcomes = await fetched(tier, KEYS[:2])
        assert outcomes[0].failure is Failure.MISSING
        assert outcomes[1].ok
    # Times of stores have whole seconds: what is stored in the same second counts as cleared.
    [cleared_at] = here._clears._times.values()
    assert here._clears.covers(SPACE, cleared_at.replace(microsecond=999_999))
    await there.clear(None, 0)
    assert (await fetched(there, KEYS[1:2]))[0].failure is Failure.MISSING
    assert (await fetched(later, KEYS[1:2]))[0].failure is Failure.MISSING


async def test_wrong_credentials_are_one_clear_error(
    s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    tier = await RemoteTier.open("s3://lmkv-wrong/x", options(s3, secret="wrong"))
    with caplog.at_level(logging.WARNING):
        assert await tier.store([chunk(key) for key in KEYS]) == [False] * len(KEYS)
        assert not (await tier.lookup(key_array(KEYS), 5)).any()
        assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.LOST
    problem = tier.status().problem
    assert problem is not None
    assert "credentials" in problem
    assert sum("credentials" in record.message for record in caplog.records) == 1


async def test_a_store_that_is_down_costs_no_waiting_and_comes_back(tmp_path: Path) -> None:
    tier = await RemoteTier.open("s3://lmkv-down/x", options("http://127.0.0.1:9"))
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
        await RemoteTier.open(url, {})


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

    async def listed(self, prefix: str, within: float) -> dict[str, Any]:
        if self.down:
            raise OSError("connection refused")
        return await super().listed(prefix, within)

    async def get(self, name: str, within: float) -> tuple[Any, Any]:
        async with asyncio.timeout(within):
            if self.hang:
                await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        data, when = await super().get(name, within)
        return (self.lie(bytes(data)) if self.lie else data), when


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
    tier = RemoteTier(faulty, None)
    await tier.store([chunk(KEYS[0]), chunk(KEYS[1])])
    faulty.lie = lie
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.CORRUPT
    faulty.lie = None
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.MISSING  # removed
    assert (await fetched(tier, KEYS[1:2]))[0].ok


async def test_another_chunks_bytes_are_not_believed(faulty: FaultyObjects) -> None:
    tier = RemoteTier(faulty, None)
    await tier.store([chunk(KEYS[0]), chunk(KEYS[1])])
    other, _ = await faulty.get(f"chunks/{KEYS[1].hex()[:2]}/{KEYS[1].hex()}.plain1", 5)
    faulty.lie = lambda _: bytes(other)
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.CORRUPT


async def test_a_slow_store_keeps_the_deadline(faulty: FaultyObjects) -> None:
    tier = RemoteTier(faulty, None)
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
    tier = RemoteTier(faulty, None)
    await tier.store([chunk(KEYS[0])])
    faulty.error = OSError("connection reset")
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.LOST
    assert tier.status().problem is not None
    faulty.error = None
    tier._try._recess._until = 0
    assert (await fetched(tier, KEYS[:1]))[0].ok
    assert tier.status().problem is None


async def test_a_clear_while_the_store_is_down_is_not_lost(
    faulty: FaultyObjects, tmp_path: Path
) -> None:
    tier, other = RemoteTier(faulty, None), await open_tier((f"file://{tmp_path}", {}, None))
    await tier.store([chunk(KEYS[0]), chunk(KEYS[1], space=8)])
    faulty.down = True
    await tier.clear(SPACE, 5)
    assert not tier.settled
    assert "What was cleared is not served" in str(tier.status().problem)
    # It may be that only writing fails: nothing of the space is served, whatever can be read.
    tier._try._recess._until = 0
    faulty.listed = super(FaultyObjects, faulty).listed  # type: ignore[method-assign]
    outcomes = await fetched(tier, KEYS[:2])
    assert outcomes[0].failure is Failure.MISSING
    assert outcomes[1].ok
    assert await tier.store([chunk(KEYS[2])]) == [False]
    faulty.down = False
    await until(lambda: tier.settled)
    assert tier.status().problem is None
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
    await asyncio.sleep(1.1)  # what is stored in the same second counts as cleared
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
    tier = RemoteTier(faulty, None)
    faulty.sent.clear()
    storing = asyncio.create_task(tier.store([chunk(KEYS[0])]))
    await until(faulty.sending.is_set)
    clearing = asyncio.create_task(tier.clear(SPACE, 5))
    await asyncio.sleep(1.1)  # its bytes arrive in a later second than the clear was asked for
    faulty.sent.set()
    await asyncio.gather(storing, clearing)
    await until(lambda: tier.settled)
    assert (await fetched(tier, KEYS[:1]))[0].failure is Failure.MISSING


async def test_another_master_key_reads_nothing_and_removes_nothing(tmp_path: Path) -> None:
    tiers = []
    for name in "ab":
        (tmp_path / name).write_text(name * 64)
        tiers.append(await open_tier((f"file://{tmp_path}/store", {}, tmp_path / name)))
    plain = await open_tier((f"file://{tmp_path}/store", {}, None))
    await tiers[0].store([chunk(KEYS[0])])
    for stranger in (tiers[1], plain):
        assert (await fetched(stranger, KEYS[:1]))[0].failure is Failure.MISSING
    assert (await fetched(tiers[0], KEYS[:1]))[0].ok


async def test_a_closed_fetch_writes_nothing_more(faulty: FaultyObjects) -> None:
    tier = RemoteTier(faulty, None)
    await tier.store([chunk(key) for key in KEYS])
    slots = [np.zeros(NBYTES, np.uint8) for _ in KEYS]
    fetch = tier.fetch(Fetch(key_array(KEYS), slots, 10))
    await anext(fetch)
    await fetch.aclose()
    before = [slot.copy() for slot in slots]
    await asyncio.gather(*(tier._try(faulty.get("x", 1)) for _ in range(20)))
    assert all((a == b).all() for a, b in zip(before, slots, strict=True))
    assert len(asyncio.all_tasks()) == 1
