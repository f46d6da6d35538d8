"""Checksums of what engines have saved, noted before others hear of it: they can read unasked.

Engines do not compute them: a GPU's copies never pass a processor. Whoever needs one that was not
noted computes it (``ArenaReader.summed``), but peers that read by themselves cannot.
"""

from __future__ import annotations

import asyncio

from lmkv_ray.arena import Summed
from lmkv_ray.keys import key_array
from lmkv_ray.node.shard import Shard

BATCH = 64
"""Chunks of one visit to a thread: for so long new ones wait."""


class Checksums:
    """Works from the first time that another host reads from here.

    Args:
        shard: the chunks of this node.
    """

    def __init__(self, shard: Shard) -> None:
        self.wanted = False
        """Whether there are such peers."""
        self._shard = shard

    async def step(self) -> None:
        """Note what is missing, as far as the shard remembers what that is."""
        while self.wanted and self._shard.unsealed:
            await self.batch()

    async def batch(self) -> None:
        """Note what is missing of the last chunks: what the directory is going to be told of."""
        unsealed = self._shard.unsealed
        if self.wanted and unsealed:
            keys = [unsealed.pop() for _ in range(min(len(unsealed), BATCH))]
            for slot, generation, value in await asyncio.to_thread(self._sum, keys):
                self._shard.writer.set_checksum(slot, generation, value)

    def _sum(self, keys: list[bytes]) -> list[Summed]:
        reader = self._shard.reader
        return reader.summed(reader.lookup(key_array(b"".join(keys))))[1]
