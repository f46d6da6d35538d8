"""Chunks in an object store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv_ray.keys import KeyArray, key_list
from lmkv_ray.tiers.base import TierCapabilities, TierChunk, TierStatus
from lmkv_ray.tiers.cipher import Cipher, load_cipher, suite_of
from lmkv_ray.tiers.clears import CLEAR_SECONDS
from lmkv_ray.tiers.counters import Counters
from lmkv_ray.tiers.remote.attempts import Attempts
from lmkv_ray.tiers.remote.clears import Clears
from lmkv_ray.tiers.remote.objects import Objects, open_objects, problem_of
from lmkv_ray.tiers.remote.packing import pack, unpack
from lmkv_ray.tiers.remote.recent import Known, Recent
from lmkv_ray.transports import Failure, Fetch, Outcome
from lmkv_ray.transports.base import all_ended, to_the_end

IN_FLIGHT = 16
"""Requests at a time for chunks, and as many for questions."""
STORE_SECONDS = 30.0
QUESTION_SECONDS = 5.0
PENDING_BYTES = 128 << 20
"""Chunks that wait or are being sent, all together; past it they are not stored."""
JUST_NOW = datetime.max.replace(tzinfo=UTC)
"""When a chunk of ours was stored; what the store's clock said we do not know."""


@dataclass(kw_only=True)
class RemoteCounters(Counters):
    """See ``Counters``."""

    store_known: int = 0
    """Not stored: somebody had done so already."""
    asked: int = 0
    """Keys that the store was asked about."""


class RemoteTier:
    """See ``Tier``. Made by ``open``."""

    name = "remote"
    capabilities = TierCapabilities(shared=True, instant=False)

    def __init__(self, objects: Objects, cipher: Cipher | None) -> None:
        self._objects = objects
        self._cipher = cipher
        self._suite = suite_of(cipher)
        self._clears = Clears(objects)
        self._recent = Recent()
        self._counters = RemoteCounters()
        self._try = Attempts(self._counters, self._mend)
        self._transfers = asyncio.Semaphore(IN_FLIGHT)
        self._questions = asyncio.Semaphore(IN_FLIGHT)
        self._pending = 0
        self._sending: set[asyncio.Task[bool]] = set()
        self._mending: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def open(
        cls, url: str, options: Mapping[str, str], *, key_file: Path | None = None
    ) -> RemoteTier:
        """Use an object store; one that does not answer now is tried again by itself.

        Raises:
            ConfigError: the URL, an option or the key file is wrong.
            UnsupportedError: a package is missing.
        """
        return cls(open_objects(url, options), load_cipher(key_file))

    async def lookup(self, keys: KeyArray, within: float) -> npt.NDArray[np.bool_]:
        """See ``Tier``. What the store does not answer in time counts as not there; what was
        cleared without the others may be said to be there.
        """
        known = {key: self._recent.get(key) for key in key_list(keys)}
        if self._try.usable:
            deadline = time.monotonic() + min(within, QUESTION_SECONDS)
            unknown = [key for key, answer in known.items() if answer is None]
            asked = [asyncio.create_task(self._known(key, deadline)) for key in unknown]
            await _finish(asked)
            known |= {key: task.result() for key, task in zip(unknown, asked, strict=True)}
        usable = self._try.usable
        held = (usable and self._is_there(known[key], None) for key in key_list(keys))
        return np.fromiter(held, np.bool_, len(keys))

    async def fetch(self, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """See ``Tier``."""
        deadline = time.monotonic() + fetch.within
        positions = range(len(fetch.keys))
        tasks = [asyncio.create_task(self._read(fetch, i, deadline)) for i in positions]
        try:
            for task in asyncio.as_completed(tasks):
                outcome = await task
                self._counters.fetched(outcome)
                yield outcome
        finally:
            for task in tasks:
                task.cancel()
            await all_ended(tasks)

    async def store(self, chunks: Sequence[TierChunk]) -> list[bool]:
        """See ``Tier``. What is not sent at once when there is much to send is dropped."""
        tasks = [asyncio.create_task(self._store_bounded(chunk)) for chunk in chunks]
        self._sending |= set(tasks)
        try:
            await _finish(tasks)
        finally:
            self._sending -= set(tasks)
        return [task.result() for task in tasks]

    async def remove(self, keys: KeyArray) -> None:
        """See ``Tier``."""
        for key in key_list(keys):
            self._recent.forget(key)
            await self._try(self._objects.delete(self._name(key), QUESTION_SECONDS))

    async def clear(self, space: int | None, number: int) -> None:
        """See ``Tier``. For everybody who shares the store; its objects stay until they expire."""
        self._recent.clear()
        self._clears.pending.add(space, number)
        self._mend()
        if self._mending is not None:
            await asyncio.wait([self._mending], timeout=CLEAR_SECONDS if self._try.usable else 0)

    @property
    def cleared(self) -> int:
        """See ``Tier``."""
        return 0

    @property
    def settled(self) -> bool:
        """See ``Tier``."""
        return not self._clears.pending

    async def pin(self, keys: KeyArray, pinned: bool) -> None:
        """See ``Tier``. Nothing to do: the store evicts by its own life-cycle rules."""

    def status(self) -> TierStatus:
        """See ``Tier``."""
        return TierStatus(
            name=self.name,
            chunks=-1,
            nbytes=-1,
            capacity=-1,
            problem=self._clears.pending.beside(self._try.problem),
            counters=asdict(self._counters),
        )

    async def close(self) -> None:
        """See ``Tier``. Other requests under way end with their callers."""
        self._closed = True
        if self._mending is not None:
            self._mending.cancel()
            await all_ended([self._mending])

    async def _known(self, key: bytes, deadline: float) -> Known | None:
        """What is known of a chunk, or what the store says; None: it does not."""
        known = self._recent.get(key)
        if known is not None:
            return known
        async with self._questions:
            left = deadline - time.monotonic()
            if left <= 0 or not self._try.usable:
                return None
            self._counters.asked += 1
            answer = await self._try(self._modified(key, left), left)
        return None if isinstance(answer, Exception) else self._recent.put(key, answer)

    def _is_there(self, known: Known | None, space: int | None) -> bool:
        """Whether a chunk of this space (None: of any) can be fetched."""
        stored = known.stored if known is not None else None
        return stored is not None and not self._clears.covers(space, stored)

    async def _modified(self, key: bytes, within: float) -> datetime | None:
        await self._clears.refresh(within)
        return await self._objects.modified(self._name(key), within)

    async def _read(self, fetch: Fetch, position: int, deadline: float) -> Outcome:
        key = fetch.keys[position].tobytes()
        async with self._transfers:
            left = deadline - time.monotonic()
            if left <= 0:
                return Outcome(position, failure=Failure.LATE)
            if not self._try.usable:
                return Outcome(position, failure=Failure.LOST, detail=self._try.problem or "")
            answer = await self._try(self._get(key, left), left)
            if isinstance(answer, Exception):
                self._recent.forget(key)
                if isinstance(answer, FileNotFoundError):
                    return Outcome(position, failure=Failure.MISSING)
                if isinstance(answer, TimeoutError):
                    return Outcome(position, failure=Failure.LATE)
                return Outcome(position, failure=Failure.LOST, detail=problem_of(answer))
            data, stored = answer
            land = partial(
                unpack, memoryview(data), key, self._cipher, fetch.destinations[position]
            )
            landed = await to_the_end(land)
            if not isinstance(landed, Failure):
                space, nbytes, checksum = landed
                if not self._clears.covers(space, stored):
                    return Outcome(position, nbytes, checksum)
                landed = Failure.MISSING
            if landed is not Failure.TOO_LARGE:  # nobody has any use for it
                self._recent.forget(key)
                await self._try(self._objects.delete(self._name(key), QUESTION_SECONDS))
            return Outcome(position, failure=landed)

    def _mend(self) -> None:
        """Something is to be done, by one task."""
        if not self._closed and (self._mending is None or self._mending.done()):
            self._mending = asyncio.create_task(self._until_well())

    async def _until_well(self) -> None:
        """Try until the store works and no clear is pending."""
        while self._clears.pending or self._try.problem is not None:
            await asyncio.sleep(self._try.pause)
            clears = self._clears.pending.items()
            # What is being sent began before: it must be there when the store is told.
            if clears and self._sending:
                await asyncio.wait(set(self._sending))
            await self._try(self._clears.carry_out(clears, QUESTION_SECONDS))
            self._recent.clear()  # it may have lost something

    async def _get(self, key: bytes, within: float) -> tuple[Any, Any]:
        await self._clears.refresh(within)
        return await self._objects.get(self._name(key), within)

    async def _store_bounded(self, chunk: TierChunk) -> bool:
        nbytes = len(chunk.data)
        if self._pending and self._pending + nbytes > PENDING_BYTES:
            self._counters.store_busy += 1
            return False
        self._pending += nbytes
        try:
            return await self._store(chunk)
        finally:
            self._pending -= nbytes

    async def _store(self, chunk: TierChunk) -> bool:
        async with self._transfers:
            if not self._try.usable or self._clears.pending.covers(chunk.space):
                return False
            if not chunk.intact():
                return False
            known = await self._known(chunk.key, time.monotonic() + QUESTION_SECONDS)
            if self._is_there(known, chunk.space):
                self._counters.store_known += 1
                return True
            # Sent from a copy that is known to be whole: what is sent is published at once.
            parts = await to_the_end(partial(pack, chunk, self._cipher))
            if not chunk.intact() or self._clears.pending.covers(chunk.space):
                self._counters.store_changed += 1
                return False
            answer = await self._try(self._objects.put(self._name(chunk.key), parts, STORE_SECONDS))
            if isinstance(answer, Exception):
                self._counters.store_failed += 1
                return False
            self._recent.put(chunk.key, JUST_NOW)
            self._counters.wrote(len(chunk.data))
            return True

    def _name(self, key: bytes) -> str:
        """Spread over prefixes, as stores partition by name."""
        text = key.hex()
        return f"chunks/{text[:2]}/{text}.{self._suite}"


async def _finish(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Wait for all; when cancelled, cancel them and wait nevertheless."""
    try:
        if tasks:
            await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await all_ended(tasks)
