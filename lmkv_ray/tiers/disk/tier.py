"""Chunks on a local disk."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lmkv_ray.clock import Clock
from lmkv_ray.errors import LmkvError
from lmkv_ray.fetch import Fetch, Outcome
from lmkv_ray.keys import KeyArray, key_list
from lmkv_ray.policies import Policy
from lmkv_ray.status import TierStatus
from lmkv_ray.tiers.base import TierCapabilities, TierChunk
from lmkv_ray.tiers.cipher import load_cipher
from lmkv_ray.tiers.clears import CLEAR_SECONDS, Unheard
from lmkv_ray.tiers.disk.clearing import Clearing
from lmkv_ray.tiers.disk.counters import DiskCounters
from lmkv_ray.tiers.disk.files import ChunkFiles
from lmkv_ray.tiers.disk.folder import TakenError
from lmkv_ray.tiers.disk.health import Health, Trouble, trouble_of
from lmkv_ray.tiers.disk.index import Entry
from lmkv_ray.tiers.disk.local import LocalMedium
from lmkv_ray.tiers.disk.medium import Medium
from lmkv_ray.tiers.disk.mending import Mending
from lmkv_ray.tiers.disk.mount import Mount, Recipe, open_mount
from lmkv_ray.tiers.disk.reading import Reading
from lmkv_ray.tiers.disk.workers import Workers
from lmkv_ray.tiers.disk.writing import Writing

T = TypeVar("T")

MAX_GONE = 1 << 16
"""Keys that are remembered as removed while there is no index; with more, all are."""
GIVE_WAY = 64
"""On a full file system, this part of what we hold is evicted before we try again."""
PATIENCE_SECONDS = 2.0
OPEN_SECONDS = 15.0
"""A disk that takes longer to open is opened beside everything else."""
CLOSE_SECONDS = 5.0
TAKEN_SECONDS = 0.05
"""Between two looks whether a predecessor has let go of the directory."""


class DiskTier:
    """See ``Tier``. Made by ``open``."""

    name = "disk"
    capabilities = TierCapabilities(shared=False, instant=True)

    def __init__(self, recipe: Recipe, threads: int, health: Health, patience: float) -> None:
        self._recipe = recipe
        self._health = health
        self._patience = patience
        clock = self._clock = recipe.clock
        self._readers = Workers(recipe.medium.threads("disk-read", threads), threads, clock)
        self._writers = Workers(
            recipe.medium.threads("disk-write", recipe.writes + 1), recipe.writes + 1, clock
        )
        self._counters = DiskCounters()
        self._mount: Mount | None = None
        self._changing = False
        self._gone: set[bytes] = set()
        """What was removed while there was no index to tell."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()
        self._mending = Mending(
            recipe.path, health, self._counters, self._try_again, self._settle, self._closing,
            clock,
        )  # fmt: skip
        self._failed = self._mending.failed
        self._writing = Writing(
            self._writers, self._counters, self._spawn, self._erase, self._failed, self._closing,
            clock,
        )  # fmt: skip
        self._clearing = Clearing(self._writers, self._erase, self._failed)
        self._opening: asyncio.Task[Exception | None] | None = None
        self._settling: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        directory: Path,
        capacity: int | None,
        *,
        make_policy: Callable[[], Policy],
        clock: Clock,
        key_file: Path | None = None,
        threads: int = 4,
        patience: float = PATIENCE_SECONDS,
        medium: Medium | None = None,
        make_files: Callable[..., ChunkFiles] = ChunkFiles,
        health: Health | None = None,
    ) -> DiskTier:
        """Take a directory into use; a disk that does not work now is tried again by itself.

        Args:
            directory: of this tier alone; made if need be.
            capacity: bytes it may take; None: a quarter of what the file system could give.
            make_policy: makes the eviction policy.
            clock: of the machine.
            key_file: encrypts with the key in this file.
            threads: that read at a time; half as many files are written at a time.
            patience: seconds to wait for a predecessor that is just ending.
            medium: has the directory; None: this machine.
            make_files: how files are read and written.
            health: when it is tried again.

        Raises:
            TierError: another shard uses the directory, or it holds something else, or chunks
                of another key.
            ConfigError: the key file cannot be used.
            UnsupportedError: encryption is wanted and the package for it is missing.
        """
        cipher = load_cipher(key_file)
        # Fewer: nobody waits for a write, and reads share the device with them.
        writes = max(threads // 2, 1)
        recipe = Recipe(
            directory, capacity, make_policy, make_files, cipher, writes,
            medium or LocalMedium(), clock,
        )  # fmt: skip
        tier = cls(recipe, threads, health or Health(), patience)
        opening = tier._opening = asyncio.create_task(tier._remount())
        await asyncio.wait([opening], timeout=OPEN_SECONDS)
        if not opening.done():
            tier._failed(TimeoutError("it is still being opened"))
        elif isinstance(error := opening.result(), LmkvError):
            await tier.close()
            raise error
        elif error is not None:
            tier._failed(error)
        return tier

    async def lookup(self, keys: KeyArray, within: float) -> npt.NDArray[np.bool_]:
        """See ``Tier``."""
        mount = self._readable()
        if mount is None:
            return np.zeros(len(keys), np.bool_)
        found = (mount.index.get(key) is not None for key in key_list(keys))
        return np.fromiter(found, np.bool_, len(keys))

    async def fetch(self, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """See ``Tier``."""
        reading = Reading(fetch, self._readers, self._readable, self._read_failed, self._clock)
        async with contextlib.aclosing(reading.outcomes()) as outcomes:
            async for outcome in outcomes:
                self._counters.fetched(outcome)
                yield outcome

    async def store(self, chunks: Sequence[TierChunk]) -> list[bool]:
        """See ``Tier``. What is not written at once when there is much to write is dropped."""
        mount = self._writable()
        return [False] * len(chunks) if mount is None else await self._writing.store(mount, chunks)

    async def remove(self, keys: KeyArray) -> None:
        """See ``Tier``."""
        if self._mount is None or self._changing:
            self._gone |= set(key_list(keys))
            if len(self._gone) > MAX_GONE:
                self._clearing.pending.add(None, 0)
                self._gone.clear()
        else:
            await self._forget(self._mount, key_list(keys))

    async def clear(self, space: int | None, number: int) -> None:
        """See ``Tier``."""
        self._clearing.pending.add(space, number)
        if self._mount is not None and not self._changing:
            self._clearing.hide(self._mount)
            within = CLEAR_SECONDS if self._health.writable else 0
            await asyncio.wait([self._settle()], timeout=within)

    @property
    def cleared(self) -> int:
        """See ``Tier``."""
        return self._mount.cleared if self._mount is not None else 0

    @property
    def settled(self) -> bool:
        """See ``Tier``."""
        return not self._clearing.pending

    @property
    def unheard(self) -> list[Unheard]:
        """See ``Tier``. A disk is of one node."""
        return []

    def heard(self, clear: Unheard) -> None:
        """See ``Tier``."""

    async def pin(self, keys: KeyArray, pinned: bool) -> None:
        """See ``Tier``. Unknown chunks are ignored, and nothing is pinned after a restart."""
        for key in key_list(keys):
            if self._mount is not None:
                self._mount.index.pin(key, pinned)

    def status(self) -> TierStatus:
        """See ``Tier``."""
        index = self._mount.index if self._mount is not None else None
        return TierStatus(
            name=self.name,
            chunks=len(index) if index is not None else 0,
            nbytes=index.used if index is not None else 0,
            capacity=index.capacity if index is not None else self._recipe.capacity or 0,
            problem=self._clearing.pending.beside(self._health.problem),
            counters=asdict(self._counters),
        )

    async def close(self) -> None:
        """See ``Tier``. A directory that a hanging write may still touch is not given to others."""
        self._closing.set()
        background = [task for task in (self._opening, self._mending.task) if task is not None]
        if background:
            await asyncio.wait(background, timeout=CLOSE_SECONDS)
        self._changing = True
        self._readers.close()
        self._writers.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
        idle = await self._readers.idle(CLOSE_SECONDS)
        idle = await self._writers.idle(CLOSE_SECONDS) and idle
        if self._mount is not None and idle:
            self._mount.files.folder.close()

    # What is in use

    def _readable(self) -> Mount | None:
        return self._mount if self._health.readable and not self._changing else None

    def _writable(self) -> Mount | None:
        return self._mount if self._health.writable and not self._changing else None

    async def _remount(self) -> Exception | None:
        """Open the directory anew; returns what is in the way."""
        self._changing = True
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._readers.idle()
        await self._writers.idle()
        give_up = self._clock.monotonic() + self._patience
        while True:
            opened = await self._writers.run(partial(open_mount, self._recipe, self._mount))
            taken = isinstance(opened, TakenError) and not self._closing.is_set()
            if not taken or self._clock.monotonic() >= give_up:
                break
            await self._clock.sleep(TAKEN_SECONDS)
        if isinstance(opened, Mount):
            self._mount = opened
            self._clearing.hide(opened, new=True)
            keys, self._gone = list(self._gone), set()
            await self._forget(opened, keys)
        self._changing = self._mount is None or self._mount.files.folder.closed
        self._settle()
        return await self._probe(opened) if isinstance(opened, Mount) else opened

    async def _probe(self, mount: Mount) -> Exception | None:
        """Whether there is room for a chunk, and it can be read again."""
        return await self._writers.run(partial(mount.files.folder.probe, self._writing.largest))

    # Removing

    async def _forget(self, mount: Mount, keys: Sequence[bytes]) -> None:
        going = [entry for key in keys if (entry := mount.index.forget(key))]
        await self._erase(mount, going)

    async def _erase(self, mount: Mount, entries: Sequence[Entry]) -> bool:
        """Remove the files of forgotten entries; whether all are gone."""
        if not entries:
            return True
        result = await self._writers.run(partial(mount.erase, entries))
        if not isinstance(result, tuple):  # closing
            return False
        gone, error = result
        for entry in gone:
            mount.index.erased(entry)
        if error is not None:
            self._failed(error)
        return error is None

    def _settle(self) -> asyncio.Task[None]:
        """Carry out the clears that are pending, as far as the disk allows; one task at a time."""
        if self._settling is None or self._settling.done():
            self._settling = self._spawn(self._carry_out())
        return self._settling

    async def _carry_out(self) -> None:
        while self._clearing.pending and self._mount is not None and not self._changing:
            writing = self._tasks - {self._settling}
            if not await self._clearing.carry_out(self._mount, writing):
                return  # trouble, which will be mended

    # Trouble

    def _read_failed(self, mount: Mount, entry: Entry, error: Exception) -> None:
        self._failed(error)
        if not isinstance(error, TimeoutError):
            self._spawn(self._forget(mount, [entry.label.key]))

    async def _try_again(self, trouble: Trouble) -> Exception | None:
        """What is still in the way."""
        mount = self._mount
        if self._opening is not None and not self._opening.done():
            return await self._opening
        if mount is None:
            return await self._remount()
        if trouble is Trouble.FULL:
            victims = mount.index.evict(mount.index.used // GIVE_WAY) or []
            self._counters.evicted += len(victims)
            await self._erase(mount, victims)
        if trouble is Trouble.SLOW:
            await self._readers.idle()  # threads that hang would keep others waiting
        error = await self._probe(mount)
        if error is None and not mount.files.littered:
            return None
        if error is not None and trouble_of(error) is not Trouble.BROKEN:
            return error
        return await self._remount()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run to the end whatever becomes of the caller; ``close`` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
