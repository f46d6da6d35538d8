"""Storing chunks: bounded, in groups, behind everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from lmkv_ray.clock import Clock
from lmkv_ray.fetch import groups
from lmkv_ray.tiers.base import TierChunk
from lmkv_ray.tiers.cipher import MAX_NBYTES
from lmkv_ray.tiers.disk.counters import DiskCounters
from lmkv_ray.tiers.disk.index import Entry
from lmkv_ray.tiers.disk.mount import Mount
from lmkv_ray.tiers.disk.workers import Workers
from lmkv_ray.tiers.format import Label

PENDING_BYTES = 128 << 20
"""Chunks that are being written, all together; past it they are not stored."""
WRITE_BYTES = 8 << 20
"""What one thread writes in one go: the loop is woken once for it, as it may have to wait for a
processor each time."""
SLOW_WRITE_SECONDS = 10.0
"""When so long nothing could be written, the disk is out of use for a while."""


class Writing:
    """What is on its way to the disk.

    Args:
        workers: who write.
        counters: of the tier.
        spawn: runs a coroutine to the end whatever becomes of the caller.
        erase: removes the files of forgotten entries.
        failed: told what the medium said.
        closing: set when what has not begun is to be abandoned.
        clock: of the machine: says since when nothing could be written.
    """

    def __init__(
        self,
        workers: Workers,
        counters: DiskCounters,
        spawn: Callable[[Coroutine[Any, Any, list[bool]]], asyncio.Task[list[bool]]],
        erase: Callable[[Mount, Sequence[Entry]], Coroutine[Any, Any, bool]],
        failed: Callable[[Exception], None],
        closing: asyncio.Event,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self.largest = 0
        """Bytes on the medium of the largest chunk so far."""
        self._workers = workers
        self._counters = counters
        self._spawn = spawn
        self._erase = erase
        self._failed = failed
        self._closing = closing
        self._room = asyncio.Lock()
        self._pending = 0
        self._progress_at = 0.0

    async def store(self, mount: Mount, chunks: Sequence[TierChunk]) -> list[bool]:
        """See ``Tier``. What is not written at once when there is much to write is dropped."""
        answers = [self._here(mount, chunk.key) for chunk in chunks]
        wanted = [i for i, chunk in enumerate(chunks) if self._admit(mount, chunk)]
        sizes = [len(chunks[i].data) for i in wanted]
        share = min(WRITE_BYTES, -(-sum(sizes) // self._workers.count))
        # Tasks of their own: what is begun is finished and accounted for, whoever is cancelled.
        tasks = {}
        for group in groups(sizes, share):
            members = [wanted[i] for i in group]
            tasks[self._spawn(self._store(mount, [chunks[i] for i in members]))] = members
        if tasks:
            await asyncio.wait(tasks)
        for task, members in tasks.items():
            for i, stored in zip(members, task.result(), strict=True):
                answers[i] = stored
        return answers

    def _here(self, mount: Mount, key: bytes) -> bool:
        """Whether a chunk is stored already; that it came again is a use of it."""
        mount.index.touched([key])
        return mount.index.get(key) is not None

    def _admit(self, mount: Mount, chunk: TierChunk) -> bool:
        """Whether to write a chunk now, which is then counted as pending."""
        nbytes = len(chunk.data)
        if not 0 < nbytes <= MAX_NBYTES or mount.index.knows(chunk.key):
            return False
        if self._pending and self._pending + nbytes > PENDING_BYTES:
            self._counters.store_busy += 1
            stuck = self._clock.monotonic() - self._progress_at
            if stuck > SLOW_WRITE_SECONDS:
                self._failed(TimeoutError(f"nothing could be written for {stuck:.0f} s"))
            return False
        if not self._pending:
            self._progress_at = self._clock.monotonic()
        self._pending += nbytes
        return True

    async def _store(self, mount: Mount, chunks: Sequence[TierChunk]) -> list[bool]:
        """Make room, write, publish: one thread, one after the other."""
        try:
            entries = await self._reserve(mount, chunks)
            pairs = [(e, c) for e, c in zip(entries, chunks, strict=True) if e is not None]
            self._counters.store_no_room += len(chunks) - len(pairs)
            write = partial(mount.write, pairs, lambda: not self._closing.is_set())
            written = await self._workers.run(write)
            results = written if isinstance(written, list) else [False] * len(pairs)
            stored = {
                chunk.key
                for (entry, chunk), result in zip(pairs, results, strict=True)
                if await self._publish(mount, entry, result)
            }
            return [chunk.key in stored for chunk in chunks]
        finally:
            self._pending -= sum(len(chunk.data) for chunk in chunks)
            self._progress_at = self._clock.monotonic()

    async def _reserve(self, mount: Mount, chunks: Sequence[TierChunk]) -> list[Entry | None]:
        """Count chunks, after making room for as many as possible, the first ones first."""
        index = mount.index
        blocks = [mount.files.blocks(len(chunk.data)) for chunk in chunks]
        self.largest = max(self.largest, *blocks)
        async with self._room:  # one at a time, so that none makes too much
            victims = None
            for number in range(len(chunks), 0, -1):
                victims = index.make_room(sum(blocks[:number]), number)
                if victims is not None:
                    break
            self._counters.evicted += len(victims or ())
            await self._erase(mount, victims or ())
            return [
                index.reserve(Label(chunk.key, chunk.space, len(chunk.data)), size)
                for chunk, size in zip(chunks, blocks, strict=True)
            ]

    async def _publish(self, mount: Mount, entry: Entry, written: bool | Exception) -> bool:
        """What became of a chunk."""
        index = mount.index
        if written is True and index.publish(entry):
            self._counters.wrote(entry.label.nbytes)
            return True
        if written is True:  # forgotten while it was written
            await self._erase(mount, [entry])
            return False
        if isinstance(written, Exception):
            self._counters.store_failed += 1
            self._failed(written)
        else:
            self._counters.store_changed += 1
        if mount.files.littered:
            index.forget(entry.label.key)  # still counted: a part of it may be there
        else:
            index.erased(entry)
        return False
