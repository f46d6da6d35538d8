"""Chunks of this folder's tests, and a store that fails and lies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.fetch import Fetch, Outcome
from lmkv_ray.keys import key_array
from lmkv_ray.tiers import TierChunk
from lmkv_ray.tiers.remote import RemoteTier
from lmkv_ray.tiers.remote.objects import Objects, open_objects

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


async def open_tier(where: tuple[str, dict[str, str], Path | None]) -> RemoteTier:
    return await RemoteTier.open(where[0], where[1], clock=SYSTEM_CLOCK, key_file=where[2])


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


def list_files(path: Path) -> list[Path]:
    return list(path.glob("chunks/*/*"))
