"""What one part of the directory keeps of clears in the cluster's memory."""

from __future__ import annotations

import asyncio

import pytest

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.config import load_settings
from lmkv_ray.directory.clears import KeptClears
from lmkv_ray.directory.service import DirectoryService
from lmkv_ray.errors import ArenaError, ConfigError
from lmkv_ray.messages import ClearDone, ShardCleared, decode, encode
from tests.node.fakes import Silence

A, B = b"a" * 8, b"b" * 8


class Memory:
    """Each save takes a shorter time than the one before it."""

    def __init__(self, data: bytes | None = None) -> None:
        self.data = data
        self.pauses = [20, 0]
        self.sizes: list[int] = []
        """How many clears each save has kept."""

    async def load(self) -> bytes | None:
        return self.data

    async def save(self, data: bytes) -> None:
        for _ in range(self.pauses.pop(0) if self.pauses else 0):
            await asyncio.sleep(0)
        self.data = data
        self.sizes.append(len(decode(data, KeptClears).clears))


def service(memory: Memory) -> DirectoryService:
    return DirectoryService(load_settings(), 0, SYSTEM_CLOCK, Silence(), memory)


async def test_of_two_clears_at_once_both_are_kept() -> None:
    memory = Memory()
    directory = service(memory)
    await asyncio.gather(directory.clear(A), directory.clear(B))
    assert memory.sizes == sorted(memory.sizes), "an answered clear was missing for a while"
    assert memory.data is not None
    assert {clear.space for clear in decode(memory.data, KeptClears).clears} == {A, B}
    heir = service(memory)
    await heir.remember()
    assert heir.state.clears.highest == directory.state.clears.highest


async def test_what_another_version_kept_does_not_keep_the_directory_from_starting() -> None:
    heir = service(Memory(b"\x93 not ours"))
    await heir.remember()
    assert heir.state.clears.highest == 0


@pytest.mark.parametrize("number", [(1 << 64) - 1, (1 << 63) - 1, 1 << 62])
async def test_a_number_that_leaves_none_above_it_is_not_taken_over(number: int) -> None:
    """Whoever may write a shared store may put a clear there, of any number."""
    directory = service(Memory())
    taken = decode(await directory.clear(A, number), ClearDone).number
    assert taken < number
    assert decode(await directory.clear(B), ClearDone).number > taken


async def test_caches_that_share_a_store_give_different_numbers() -> None:
    """Also while no clock says any: another cache's clock was ahead when it cleared."""
    ahead = int((SYSTEM_CLOCK.wall() + 3600) * 1e9)
    numbers = set()
    for _ in range(4):
        directory = service(Memory())
        assert decode(await directory.clear(A, ahead), ClearDone).number == ahead
        numbers.add(decode(await directory.clear(B), ClearDone).number)
    assert len(numbers) == 4


@pytest.mark.parametrize("space", [b"a", b"a" * 7, b"a" * 9, b"a" * 2000])
async def test_a_clear_of_no_space_is_not_taken_on(space: bytes) -> None:
    directory = service(Memory())
    with pytest.raises(ConfigError, match="8 bytes"):
        await directory.clear(space)
    assert directory.state.clears.highest == 0


class Liar(Silence):
    """A shard that has always carried out everything."""

    async def ask(self, method: str, *arguments: object, within: float) -> bytes | None:
        return encode(ShardCleared(previous=(1 << 64) - 1)) if method == "catch_up" else None


async def test_a_shard_that_lies_does_not_keep_a_clear_from_ending() -> None:
    directory = DirectoryService(load_settings(), 0, SYSTEM_CLOCK, Liar(), Memory())
    directory.shards = {"n"}
    with pytest.raises(ArenaError, match="restart their shards"):
        await asyncio.wait_for(directory.clear(A), 30)
    assert directory.state.clears.highest < 1 << 62
