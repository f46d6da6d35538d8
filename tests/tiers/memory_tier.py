"""A tier that keeps chunks in a dictionary: for tests of those who use tiers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import numpy as np
import numpy.typing as npt

from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.keys import KeyArray, key_list
from lmkv_ray.status import TierStatus
from lmkv_ray.tenants import covers
from lmkv_ray.tiers import TierCapabilities, TierChunk
from lmkv_ray.tiers.clears import Unheard


class MemoryTier:
    capabilities = TierCapabilities(shared=False, instant=True)

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self.chunks: dict[bytes, tuple[int, bytes]] = {}
        self.gate = asyncio.Event()
        """Writes wait for it before they are published."""
        self.gate.set()
        self.error: Exception | None = None
        """What writes raise after that, against what a tier promises."""
        self.asked = asyncio.Event()
        """A write has begun."""
        self.written = 0
        self.settled = True
        self.cleared = 0
        self.unheard: list[Unheard] = []
        self.numbers: list[int] = []
        """Of the clears."""
        self.delay = 0.0

    async def lookup(self, keys: KeyArray, within: float) -> npt.NDArray[np.bool_]:
        return np.array([key in self.chunks for key in key_list(keys)], np.bool_)

    async def fetch(self, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        await asyncio.sleep(self.delay)
        for position, key in enumerate(key_list(fetch.keys)):
            found = self.chunks.get(key)
            if found is None:
                yield Outcome(position, failure=Failure.MISSING)
                continue
            fetch.destinations[position][: len(found[1])] = np.frombuffer(found[1], np.uint8)
            yield Outcome(position, len(found[1]))

    async def store(self, chunks: Sequence[TierChunk]) -> list[bool]:
        stored = []
        for chunk in chunks:
            data = chunk.data.tobytes()
            self.asked.set()
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            stored.append(chunk.intact())
            if stored[-1]:
                self.chunks[chunk.key] = (chunk.space, data)
                self.written += 1
        return stored

    async def clear(self, space: int | None, number: int) -> None:
        self.numbers.append(number)
        self.chunks = {k: v for k, v in self.chunks.items() if not covers(space, v[0])}

    def heard(self, clear: Unheard) -> None:
        self.unheard.remove(clear)

    async def pin(self, keys: KeyArray, pinned: bool) -> None:
        pass

    def status(self) -> TierStatus:
        return TierStatus(
            name=self.name,
            chunks=len(self.chunks),
            nbytes=0,
            capacity=-1,
            problem=None,
            counters={},
        )

    async def close(self) -> None:
        pass
