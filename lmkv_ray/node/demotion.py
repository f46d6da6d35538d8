"""Writing chunks to lower tiers, behind everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from lmkv_ray.arena import ArenaReader, Hits
from lmkv_ray.keys import key_array
from lmkv_ray.node.shard import Shard
from lmkv_ray.tiers import Tier, TierChunk

PASS_BYTES = 64 << 20
"""Written in one pass: a bound on what is in flight."""
PASS_SECONDS = 2.0
"""A tier that takes longer for a pass is passed over until it has done it: the others go on."""


class Demotion:
    """Gives each tier what the shard's admission rule names.

    A chunk stays in memory while it is written; nothing keeps it there. If it is evicted meanwhile,
    the tier notices before it publishes (``TierChunk.intact``).

    Args:
        shard: where from.
        tiers: where to; each gets every chunk.
    """

    def __init__(self, shard: Shard, tiers: Sequence[Tier]) -> None:
        self._shard = shard
        self._tiers = tiers
        self._writing = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[list[bool]]] = {}
        """By tier: the pass that it has not been seen to end."""

    async def step(self) -> None:
        """Write until nothing waits, or no tier takes more.

        Raises:
            ExceptionGroup: what tiers raised, against their promise, now or when they were late.
        """
        admission = self._shard.state.chunks.admission
        while (tiers := self._free()) and len(admission):
            async with self._writing:
                if chunks := self._chunks(admission.take):
                    tasks = {t.name: asyncio.create_task(t.store(chunks)) for t in tiers}
                    self._tasks |= tasks
                    await asyncio.wait(tasks.values(), timeout=PASS_SECONDS)

    def _free(self) -> list[Tier]:
        """Tiers that have done their pass. Raises as ``step`` does."""
        ended = [self._tasks.pop(name) for name, task in [*self._tasks.items()] if task.done()]
        errors = [error for task in ended if not task.cancelled() and (error := task.exception())]
        if errors:
            raise BaseExceptionGroup("writing to tiers", errors)
        return [tier for tier in self._tiers if tier.name not in self._tasks]

    async def write(self, keys: Sequence[bytes], tier: Tier) -> list[bytes]:
        """Write these chunks to one tier; those that can be found there now."""
        written: list[bytes] = []
        waiting = iter(keys)
        while True:
            async with self._writing:
                chunks = self._chunks(lambda: next(waiting, None))
                if not chunks:
                    return written
                stored = await tier.store(chunks)
            written += [c.key for c, good in zip(chunks, stored, strict=True) if good]

    def _chunks(self, take: Callable[[], bytes | None]) -> list[TierChunk]:
        """The next chunks that are still in memory, as many as one pass writes."""
        reader = self._shard.reader
        chunks: list[TierChunk] = []
        total = 0
        while total < PASS_BYTES and (key := take()) is not None:
            hits = reader.lookup(key_array(key))
            space = self._shard.state.chunks.space(key)
            if space is None or not hits.found[0]:
                continue
            at, nbytes = int(hits.offsets[0]), int(hits.nbytes[0])
            intact = partial(_intact, reader, hits)
            chunks.append(TierChunk(key, space, reader.data[at : at + nbytes], intact))
            total += nbytes
        return chunks


def _intact(reader: ArenaReader, hits: Hits) -> bool:
    return bool(reader.unchanged(hits.slots, hits.generations)[0])
