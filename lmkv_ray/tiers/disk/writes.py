"""All that changes the disk: chunks stored, erased and cleared.

What is stored is bounded, in groups, behind everything else. What was cleared is not found from
then on, and its files are erased. A clear has been carried out when no file of it is left, not even
one that was being written. Only then its number is noted in the folder, so that a shard that comes
after us need not repeat it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from lmkv_ray.clock import Clock
from lmkv_ray.fetch import groups
from lmkv_ray.tiers.base import TierChunk
from lmkv_ray.tiers.cipher import MAX_NBYTES
from lmkv_ray.tiers.clears import PendingClears
from lmkv_ray.tiers.counters import DiskCounters
from lmkv_ray.tiers.disk.index import Entry
from lmkv_ray.tiers.disk.mount import Mount
from lmkv_ray.tiers.disk.workers import Workers
from lmkv_ray.tiers.format import Label

T = TypeVar("T")

PENDING_BYTES = 128 << 20
"""Chunks that are being written, all together; past it they are not stored."""
WRITE_BYTES = 8 << 20
"""What one thread writes in one go: the loop is woken once for it, as it may have to wait for a
processor each time."""
SLOW_WRITE_SECONDS = 10.0
"""When so long nothing could be written, the disk is out of use for a while."""


class DiskWrites:
    """What is on its way to the disk, and what is to be removed from it.

    Args:
        workers: the threads that write.
        counters: the tier's counters, raised here.
        failed: told what the medium said.
        clock: of the machine: says since when nothing could be written.
    """

    def __init__(
        self,
        workers: Workers,
        counters: DiskCounters,
        failed: Callable[[Exception], None],
        clock: Clock,
    ) -> None:
        self.largest = 0
        """Bytes on the medium of the largest chunk so far."""
        self.tasks: set[asyncio.Task[Any]] = set()
        """What has begun: it is finished and accounted for, whichever caller is cancelled."""
        self.clears = PendingClears()
        self._workers = workers
        self._counters = counters
        self._failed = failed
        self._clock = clock
        self._room = asyncio.Lock()
        self._pending = 0
        self._progress_at = 0.0
        self._hidden: list[Entry] = []
        """Forgotten for a clear, and not erased yet."""
        self._cleared = 0
        """The number of the last clear that was carried out here, on whatever disk."""

    async def store(self, mount: Mount, chunks: Sequence[TierChunk]) -> list[bool]:
        """See ``Tier``. What is not written at once when there is much to write is dropped."""
        answers = [self._here(mount, chunk.key) for chunk in chunks]
        wanted = [i for i, chunk in enumerate(chunks) if self._admit(mount, chunk)]
        sizes = [len(chunks[i].data) for i in wanted]
        share = min(WRITE_BYTES, -(-sum(sizes) // self._workers.count))
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

    async def erase(self, mount: Mount, entries: Sequence[Entry]) -> bool:
        """Remove the files of forgotten entries; whether all are gone."""
        if not entries:
            return True
        result = await self._workers.run(partial(_remove, mount, entries))
        if not isinstance(result, tuple):  # closing
            return False
        gone, error = result
        for entry in gone:
            mount.index.erased(entry)
        if error is not None:
            self._failed(error)
        return error is None

    def lost(self, mount: Mount, entry: Entry) -> None:
        """A chunk cannot be read any more: no look-up shall find it again."""
        if mount.index.forget(entry.label.key):
            self._spawn(self.erase(mount, [entry]))

    def hide(self, mount: Mount, *, new: bool = False) -> None:
        """Let no look-up find what is to be cleared.

        Args:
            mount: where.
            new: it was just opened, and what had been forgotten was erased.
        """
        if new:
            self._hidden = []
            if (
                mount.cleared < self._cleared
            ):  # the folder is older than the last clear: it may have missed some
                self.clears.add(None, self._cleared)
        self._cleared = max(self._cleared, mount.cleared)
        for space, clear in self.clears.items():
            if 0 < clear.number <= mount.cleared:  # by our predecessor
                self.clears.done(space, clear)
                continue
            forgotten = map(mount.index.forget, mount.index.keys(space))
            self._hidden += [entry for entry in forgotten if entry]

    async def carry_out(self, mount: Mount) -> bool:
        """Erase what is hidden, and note it; False if the medium is in the way."""
        clears, hidden, self._hidden = self.clears.items(), self._hidden, []
        if self.tasks:  # a task that writes a forgotten chunk erases it
            await asyncio.wait(set(self.tasks))
        if not await self.erase(mount, hidden) or mount.files.littered:
            return False
        number = max([mount.cleared, *(clear.number for _, clear in clears)])
        if number > mount.cleared:
            problem = await self._workers.run(partial(mount.files.folder.note_cleared, number))
            if problem is not None:
                self._failed(problem)
                return False
            mount.cleared = self._cleared = number
        for space, clear in clears:
            self.clears.done(space, clear)
        return True

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
            written = await self._workers.run(partial(self._write, mount, pairs))
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
            await self.erase(mount, victims or ())
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
            await self.erase(mount, [entry])
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

    def _write(
        self, mount: Mount, pairs: Sequence[tuple[Entry, TierChunk]]
    ) -> list[bool | Exception]:
        """Write and publish files, in a thread; see ``ChunkFiles.write``."""
        results: list[bool | Exception] = []
        for entry, chunk in pairs:
            try:
                results.append(
                    not self._workers.closed
                    and mount.files.write(entry.label, chunk.data, chunk.intact)
                )
            except Exception as error:
                results.append(error)
        return results

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


def _remove(mount: Mount, entries: Sequence[Entry]) -> tuple[list[Entry], Exception | None]:
    """Remove files, in a thread; those that are gone, and what is in the way of the others."""
    gone: list[Entry] = []
    for entry in entries:
        try:
            mount.files.remove(entry.label)
        except OSError as error:
            mount.files.littered = True
            return gone, error
        gone.append(entry)
    return gone, None
