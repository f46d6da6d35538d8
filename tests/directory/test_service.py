"""What one part of the directory keeps of clears in the cluster's memory."""

from __future__ import annotations

import asyncio

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.config import load_settings
from lmkv_ray.directory.clears import KeptClears
from lmkv_ray.directory.service import DirectoryService
from lmkv_ray.messages import decode
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
