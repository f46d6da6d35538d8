"""Checksums are noted once peers read from here, of what was saved since and shortly before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import cast

import pytest

from lmkv_ray.arena import checksum
from lmkv_ray.config import load_settings
from lmkv_ray.messages import Clear, Commit, Delta
from lmkv_ray.node.checksums import BATCH, Checksums
from lmkv_ray.node.directory import DirectoryClient
from lmkv_ray.node.reports import Reports
from lmkv_ray.node.shard import Shard
from tests.node.fakes import CHUNK_BYTES, LocalShard, make_keys, new_arena

SETTINGS = load_settings({"capacity": 16 << 20})
SPACE = 1
KEYS = make_keys(2 * BATCH + 3)


@pytest.fixture
def shard() -> Iterator[Shard]:
    shard = LocalShard(new_arena(SETTINGS), SETTINGS)
    yield shard
    shard.close()


def publish(shard: Shard, keys: list[bytes], value: int = 0) -> None:
    size = shard.writer.geometry.slot_size(CHUNK_BYTES)
    while keys:
        slots = shard.reserve(SPACE, size, len(keys))
        assert slots
        commits = [
            Commit(slot=s, key=k, nbytes=CHUNK_BYTES) for s, k in zip(slots, keys, strict=False)
        ]
        shard.commit(SPACE, size, commits, [value] * len(commits))
        keys = keys[len(slots) :]


def slots_of(shard: Shard, keys: list[bytes]) -> list[int]:
    slots = [slot for key in keys if (slot := shard.state.chunks.slot(key)) is not None]
    assert len(slots) == len(keys)
    return slots


def noted(shard: Shard, keys: list[bytes]) -> list[int]:
    return [int(shard.writer._slots["checksum"][slot]) for slot in slots_of(shard, keys)]


async def test_what_was_saved_gets_its_checksum(shard: Shard) -> None:
    publish(shard, KEYS[1:])
    publish(shard, KEYS[:1], value=17)  # it came from a peer, with its checksum
    checksums = Checksums(shard)
    await checksums.step()
    assert not any(noted(shard, KEYS[1:])), "nobody needs it"
    checksums.wanted = True
    await checksums.step()
    payloads = [shard.writer.payload(slot)[:CHUNK_BYTES] for slot in slots_of(shard, KEYS)]
    assert noted(shard, KEYS) == [17, *map(checksum, payloads[1:])]
    assert not shard.unsealed


class Listening:
    """A directory: what it was told first, as far as checksums of these keys go."""

    def __init__(self, shard: Shard, keys: list[bytes]) -> None:
        self._shard, self._keys = shard, keys
        self.told: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()

    async def tell(self, part: int, delta: Delta) -> None:
        if not self.told.done():
            self.told.set_result(noted(self._shard, self._keys))


async def hear(shard: Shard, seal: Callable[[], Awaitable[object]]) -> list[int]:
    """What the directory hears of the first keys."""

    async def no_clears(clears: list[Clear]) -> None:
        assert not clears

    directory = Listening(shard, KEYS[:5])
    tasks = Reports(shard, cast(DirectoryClient, directory), no_clears, seal).start()
    try:
        return await asyncio.wait_for(directory.told, 30)
    finally:
        for task in tasks:
            task.cancel()


async def test_the_directory_hears_of_chunks_that_have_their_checksums(shard: Shard) -> None:
    """Who has heard of them from it can read them without asking."""
    checksums = Checksums(shard)
    checksums.wanted = True
    publish(shard, KEYS[:5])
    assert all(await hear(shard, checksums.batch))


async def test_checksums_that_do_not_come_keep_nothing_from_the_directory(shard: Shard) -> None:
    publish(shard, KEYS[:5])
    assert not any(await hear(shard, asyncio.Event().wait))


async def test_what_went_meanwhile_is_let_go(shard: Shard) -> None:
    publish(shard, KEYS)
    shard.evict(KEYS[:5])
    publish(shard, KEYS[:5], value=17)
    checksums = Checksums(shard)
    checksums.wanted = True
    await checksums.step()
    assert noted(shard, KEYS[:5]) == [17] * 5
    assert all(noted(shard, KEYS))
