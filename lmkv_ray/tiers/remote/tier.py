"""Chunks in an object store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lmkv_ray.keys import KeyArray, key_list
from lmkv_ray.tiers.base import TierCapabilities, TierChunk, TierStatus
from lmkv_ray.tiers.cipher import Cipher, load_cipher
from lmkv_ray.tiers.clears import CLEAR_SECONDS
from lmkv_ray.tiers.counters import Counters
from lmkv_ray.tiers.remote.clears import Clears
from lmkv_ray.tiers.remote.objects import Objects, open_objects, problem_of
from lmkv_ray.tiers.remote.packing import pack, unpack
from lmkv_ray.tiers.remote.recent import Recent
from lmkv_ray.tiers.remote.recess import Recess
from lmkv_ray.transports import Failure, Fetch, Outcome
from lmkv_ray.transports.base import all_ended, to_the_end

logger = logging.getLogger(__name__)
T = TypeVar("T")

IN_FLIGHT = 16
"""Requests at a time for chunks, and as many for questions."""
STORE_SECONDS = 30.0
QUESTION_SECONDS = 5.0
PATIENCE_SECONDS = 1.0
"""A store that takes longer is out of use for a while."""


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
        self._clears = Clears(objects)
        self._recess = Recess()
        self._recent = Recent()
        self._counters = RemoteCounters()
        self._transfers = asyncio.Semaphore(IN_FLIGHT)
        self._questions = asyncio.Semaphore(IN_FLIGHT)
        self._sending: set[asyncio.Task[bool]] = set()
        self._settling: asyncio.Task[None] | None = None

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
        """See ``Tier``. What the store does not answer in time counts as not there."""
        held = [self._recent.get(key) for key in key_list(keys)]
        unknown = [i for i, known in enumerate(held) if known is None]
        if unknown and self._usable():
            deadline = time.monotonic() + min(within, QUESTION_SECONDS)
            asked = [asyncio.create_task(self._holds(key_list(keys)[i], deadline)) for i in unknown]
            await _finish(asked)
            for i, task in zip(unknown, asked, strict=True):
                held[i] = task.result()
        return np.array([bool(known) for known in held], np.bool_)

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
        """See ``Tier``."""
        tasks = [asyncio.create_task(self._store(chunk)) for chunk in chunks]
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
            await self._try(self._objects.delete(_name(key), QUESTION_SECONDS))

    async def clear(self, space: int | None, number: int) -> None:
        """See ``Tier``. For everybody who shares the store; its objects stay until they expire."""
        self._recent.clear()
        self._clears.pending.add(space, number)
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle())
        await asyncio.wait([self._settling], timeout=CLEAR_SECONDS if self._usable() else 0)

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
            problem=self._clears.pending.beside(self._recess.problem),
            counters=asdict(self._counters),
        )

    async def close(self) -> None:
        """See ``Tier``. Other requests under way end with their callers."""
        if self._settling is not None:
            self._settling.cancel()
            await all_ended([self._settling])

    async def _holds(self, key: bytes, deadline: float) -> bool | None:
        async with self._questions:
            left = deadline - time.monotonic()
            if left <= 0 or not self._usable():
                return None
            self._counters.asked += 1
            answer = await self._try(self._objects.modified(_name(key), left), left)
        if isinstance(answer, Exception):
            return None
        self._recent.put(key, answer is not None)
        return answer is not None

    async def _read(self, fetch: Fetch, position: int, deadline: float) -> Outcome:
        key = fetch.keys[position].tobytes()
        async with self._transfers:
            left = deadline - time.monotonic()
            if left <= 0:
                return Outcome(position, failure=Failure.LATE)
            if not self._usable():
                return Outcome(position, failure=Failure.LOST, detail=self._recess.problem or "")
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
            if isinstance(landed, Failure):
                if landed is Failure.CORRUPT:
                    await self._try(self._objects.delete(_name(key), QUESTION_SECONDS))
                return Outcome(position, failure=landed)
            space, nbytes, checksum = landed
            if self._clears.covers(space, stored):
                self._recent.put(key, False)
                return Outcome(position, failure=Failure.MISSING)
            return Outcome(position, nbytes, checksum)

    async def _settle(self) -> None:
        """Carry out the clears that are pending, when the store allows."""
        while self._clears.pending:
            await asyncio.sleep(self._recess.left(time.monotonic()))
            clears = self._clears.pending.items()
            # What is being sent began before: it must be there when the store is told.
            if self._sending:
                await asyncio.wait(set(self._sending))
            await self._try(self._clears.carry_out(clears, QUESTION_SECONDS))

    async def _get(self, key: bytes, within: float) -> tuple[Any, Any]:
        await self._clears.refresh(within)
        return await self._objects.get(_name(key), within)

    async def _store(self, chunk: TierChunk) -> bool:
        async with self._transfers:
            if not self._usable() or self._clears.pending.covers(chunk.space):
                return False
            if not chunk.intact():
                return False
            known = self._recent.get(chunk.key)
            if known is None:
                known = await self._holds(chunk.key, time.monotonic() + QUESTION_SECONDS)
            if known:
                self._counters.store_known += 1
                return True
            # Sent from a copy that is known to be whole: what is sent is published at once.
            parts = await to_the_end(partial(pack, chunk, self._cipher))
            if not chunk.intact():
                self._counters.store_changed += 1
                return False
            answer = await self._try(self._objects.put(_name(chunk.key), parts, STORE_SECONDS))
            if isinstance(answer, Exception):
                self._counters.store_failed += 1
                return False
            self._recent.put(chunk.key, True)
            self._counters.wrote(len(chunk.data))
            return True

    def _usable(self) -> bool:
        return self._recess.over(time.monotonic())

    async def _try(
        self, call: Coroutine[Any, Any, T], within: float = PATIENCE_SECONDS
    ) -> T | Exception:
        """Do something with the store; its errors put it out of use for a while.

        Args:
            call: what to do.
            within: seconds it was given: too few, and lateness says nothing about the store.
        """
        try:
            result = await call
        except FileNotFoundError as error:
            self._recess.worked()
            return error
        except Exception as error:
            hurried = isinstance(error, TimeoutError) and within < PATIENCE_SECONDS
            problem = problem_of(error)
            if not hurried and self._recess.failed(problem, time.monotonic()):
                self._counters.troubles += 1
                logger.warning("lmkv_ray: %s", problem)
            return error
        self._recess.worked()
        return result


async def _finish(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Wait for all; when cancelled, cancel them and wait nevertheless."""
    try:
        if tasks:
            await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await all_ended(tasks)


def _name(key: bytes) -> str:
    """Spread over prefixes, as stores partition by name."""
    text = key.hex()
    return f"chunks/{text[:2]}/{text}"
