"""Chunks of the remote tier over a real S3 server, a directory, and a store that fails and lies."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.errors import ConfigError
from lmkv_ray.fetch import Failure, Fetch
from lmkv_ray.keys import key_array
from lmkv_ray.tiers.remote import RemoteTier
from tests.tiers.harness import secret
from tests.tiers.remote.store import (
    KEYS,
    NBYTES,
    FaultyObjects,
    chunk,
    data_of,
    fetched,
    list_files,
    open_tier,
)
from tests.tiers.s3 import options


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


async def test_nothing_readable_is_in_the_store(tmp_path: Path) -> None:
    key_file = secret(tmp_path / "key", "0123456789abcdef" * 4)
    for key in (None, key_file):
        store = f"{tmp_path}/store-{key is None}"
        tier = await open_tier((f"file://{store}", {}, key))
        assert await tier.store([chunk(KEYS[0])]) == [True]
        [file] = list_files(Path(store))
        plain = data_of(KEYS[0])[5000:5064].tobytes()
        assert (plain in file.read_bytes()) == (key is None), "the test would see it"
