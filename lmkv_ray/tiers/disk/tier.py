"""Chunks on a local disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmkv_ray.clock import Clock
from lmkv_ray.errors import LmkvError
from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.fetch import failed as all_failed
from lmkv_ray.keys import KeyArray, key_list
from lmkv_ray.policies import Policy
from lmkv_ray.status import TierStatus
from lmkv_ray.tiers.base import TierCapabilities, TierChunk
from lmkv_ray.tiers.breaker import Breaker
from lmkv_ray.tiers.cipher import load_cipher
from lmkv_ray.tiers.clears import CLEAR_SECONDS, Unheard
from lmkv_ray.tiers.counters import DiskCounters
from lmkv_ray.tiers.disk.files import ChunkFiles
from lmkv_ray.tiers.disk.folder import TakenError
from lmkv_ray.tiers.disk.health import DiskHealth, Trouble, trouble_of
from lmkv_ray.tiers.disk.index import Entry
from lmkv_ray.tiers.disk.local import LocalMedium
from lmkv_ray.tiers.disk.medium import Medium
from lmkv_ray.tiers.disk.mount import Mount, Recipe, open_mount
from lmkv_ray.tiers.disk.reads import DiskReads
from lmkv_ray.tiers.disk.workers import Workers
from lmkv_ray.tiers.disk.writes import DiskWrites

logger = logging.getLogger(__name__)

GIVE_WAY = 64
"""On a full file system, this part of what we hold is evicted before we try again."""
PATIENCE_SECONDS = 2.0
TAKEN_SECONDS = 0.05
"""Between two looks whether a predecessor has let go of the folder."""
OPEN_SECONDS = 15.0
"""A disk that takes longer to open is opened beside everything else."""
CLOSE_SECONDS = 5.0


class DiskTier:
    """See ``Tier``. Made by ``open``.

    One task, the keeper, does one thing at a time: it opens the folder, mends the disk and carries
    out clears. Chunks are stored and fetched meanwhile, as far as the disk's health allows.
    """

    name = "disk"
    capabilities = TierCapabilities(shared=False, instant=True)

    def __init__(self, recipe: Recipe, threads: int, patience: float, breaker: Breaker) -> None:
        medium, clock = recipe.medium, recipe.clock
        self._recipe = recipe
        self._patience = patience
        self._clock = clock
        self._health = DiskHealth(breaker)
        self._counters = DiskCounters()
        self._readers = Workers(medium.threads("disk-read", threads), threads, clock)
        writers = recipe.writes + 1
        self._writers = Workers(medium.threads("disk-write", writers), writers, clock)
        self._writes = DiskWrites(self._writers, self._counters, self._failed, clock)
        self._mount: Mount | None = None
        self._work = asyncio.Event()
        """There is something to do for the keeper."""
        self._settled = asyncio.Event()
        """No clear is pending, as the keeper found."""
        self._opening: asyncio.Task[Exception | None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False

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
        breaker: Breaker | None = None,
    ) -> DiskTier:
        """Take a directory into use; a disk that does not work now is tried again by itself.

        Args:
            directory: of this tier alone; made if need be.
            capacity: bytes it may take; None: a quarter of what the file system could give.
            make_policy: makes the eviction policy.
            clock: the machine's time and chance.
            key_file: encrypts with the key in this file.
            threads: that read at a time; half as many files are written at a time.
            patience: seconds to wait for a predecessor that is just ending.
            medium: has the directory; None: this machine.
            make_files: how files are read and written.
            breaker: says when a disk in trouble is tried again.

        Raises:
            TierError: another shard uses the directory, or it holds something else, or chunks
                of another key.
            ConfigError: the key file cannot be used.
            UnsupportedError: encryption is wanted and the package for it is missing.
        """
        cipher = load_cipher(key_file)
        # Fewer: nothing waits for a write, and reads share the device with them.
        writes = max(threads // 2, 1)
        medium = medium or LocalMedium()
        recipe = Recipe(directory, capacity, make_policy, make_files, cipher, writes, medium, clock)
        tier = cls(recipe, threads, patience, breaker or Breaker())
        opening = tier._opening = asyncio.create_task(tier._remount())
        await asyncio.wait([opening], timeout=OPEN_SECONDS)
        if not opening.done():
            tier._failed(TimeoutError("it is still being opened"))
        elif isinstance(error := opening.result(), LmkvError):
            await tier.close()
            raise error
        elif error is not None:
            tier._failed(error)
        tier._keeper = asyncio.create_task(tier._keep())
        return tier

    async def lookup(self, keys: KeyArray, within: float) -> npt.NDArray[np.bool_]:
        """See ``Tier``."""
        mount = self._in_use(self._health.readable)
        if mount is None:
            return np.zeros(len(keys), np.bool_)
        found = (mount.index.get(key) is not None for key in key_list(keys))
        return np.fromiter(found, np.bool_, len(keys))

    async def fetch(self, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """See ``Tier``."""
        mount = self._in_use(self._health.readable)
        if mount is None:
            for outcome in all_failed(range(len(fetch.keys)), Failure.MISSING):
                yield outcome
            return
        failed = partial(self._read_failed, mount)
        reads = DiskReads(fetch, mount, self._health, self._readers, failed, self._clock)
        async with contextlib.aclosing(reads.outcomes()) as outcomes:
            async for outcome in outcomes:
                self._counters.fetched(outcome)
                yield outcome

    async def store(self, chunks: Sequence[TierChunk]) -> list[bool]:
        """See ``Tier``. What is not written at once when there is much to write is dropped."""
        mount = self._in_use(self._health.writable)
        return [False] * len(chunks) if mount is None else await self._writes.store(mount, chunks)

    async def clear(self, space: int | None, number: int) -> None:
        """See ``Tier``."""
        self._writes.clears.add(space, number)
        self._settled.clear()
        if (mount := self._in_use()) is not None:
            self._writes.hide(mount)
            self._work.set()
            within = CLEAR_SECONDS if self._health.writable else 0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), within)

    @property
    def cleared(self) -> int:
        """See ``Tier``."""
        return self._mount.cleared if self._mount is not None else 0

    @property
    def settled(self) -> bool:
        """See ``Tier``."""
        return not self._writes.clears

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
            problem=self._writes.clears.beside(self._health.problem),
            counters=asdict(self._counters),
        )

    async def close(self) -> None:
        """See ``Tier``. A folder that a hanging write may still touch is not given to others."""
        self._closing = True
        self._work.set()
        self._readers.close()
        self._writers.close()
        tasks = {task for task in (self._opening, self._keeper) if task} | self._writes.tasks
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        idle = await self._readers.idle(CLOSE_SECONDS)
        idle = await self._writers.idle(CLOSE_SECONDS) and idle
        if self._mount is not None and idle:
            self._mount.files.folder.close()

    def _in_use(self, wanted: bool = True) -> Mount | None:
        mount = self._mount
        usable = mount is not None and mount.in_use and not self._closing
        return mount if usable and wanted else None

    # Trouble

    def _failed(self, error: Exception) -> None:
        """The disk is in trouble: out of use until an attempt to mend it has succeeded."""
        if not self._closing and self._health.failed(error, self._clock.monotonic()):
            self._counters.troubles += 1
            logger.warning("lmkv_ray: disk tier %s: %s", self._recipe.path, self._health.problem)
            self._work.set()

    def _read_failed(self, mount: Mount, error: Exception, entry: Entry | None) -> None:
        self._failed(error)
        if entry is not None:
            self._writes.lost(mount, entry)

    # The keeper

    async def _keep(self) -> None:
        """Do what is to be done, until the tier is closed."""
        while not self._closing:
            self._work.clear()
            await self._carry_out()
            now, trouble = self._clock.monotonic(), self._health.trouble
            if trouble is not None and self._health.pause(now) == 0:
                error = await self._try_again(trouble)
                if error is None:
                    self._health.mended()
                    logger.info("lmkv_ray: disk tier %s is in use again", self._recipe.path)
                    continue
                self._health.failed(error, self._clock.monotonic())
            if not self._closing:
                with contextlib.suppress(TimeoutError):
                    pause = self._health.pause(self._clock.monotonic())
                    await asyncio.wait_for(self._work.wait(), pause)

    async def _carry_out(self) -> None:
        """Carry out the clears that are pending, as far as the disk allows."""
        while self._writes.clears and (mount := self._in_use(self._health.readable)):
            if not await self._writes.carry_out(mount):
                return  # trouble, which will be mended
        if not self._writes.clears:
            self._settled.set()

    async def _remount(self) -> Exception | None:
        """Open the folder anew; returns what is in the way."""
        if self._mount is not None:
            self._mount.in_use = False
        if self._writes.tasks:
            await asyncio.wait(set(self._writes.tasks))
        await self._readers.idle()
        await self._writers.idle()
        give_up = self._clock.monotonic() + self._patience
        while True:
            opened = await self._writers.run(partial(open_mount, self._recipe, self._mount))
            taken = isinstance(opened, TakenError) and not self._closing
            if not taken or self._clock.monotonic() >= give_up:
                break
            await self._clock.sleep(TAKEN_SECONDS)
        if not isinstance(opened, Mount):
            if self._mount is not None and not self._mount.files.folder.closed:
                self._mount.in_use = True
            return opened
        self._mount = opened
        self._writes.hide(opened, new=True)
        return await self._probe(opened)

    async def _probe(self, mount: Mount) -> Exception | None:
        """Whether there is room for a chunk, and it can be read again."""
        return await self._writers.run(partial(mount.files.folder.probe, self._writes.largest))

    async def _try_again(self, trouble: Trouble) -> Exception | None:
        """Do what the trouble asks for; what is still in the way."""
        if self._opening is not None and not self._opening.done():
            return await self._opening
        mount = self._mount
        if mount is None:
            return await self._remount()
        if trouble is Trouble.FULL:
            victims = mount.index.evict(mount.index.used // GIVE_WAY) or []
            self._counters.evicted += len(victims)
            await self._writes.erase(mount, victims)
        if trouble is Trouble.SLOW:
            await self._readers.idle()  # threads that hang would keep others waiting
        error = await self._probe(mount)
        if error is None and not mount.files.littered:
            return None
        if error is not None and trouble_of(error) is not Trouble.BROKEN:
            return error
        return await self._remount()
