"""Chunks in an object store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv_ray.clock import Clock
from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.keys import KeyArray, key_list
from lmkv_ray.status import TierStatus
from lmkv_ray.tiers.base import TierCapabilities, TierChunk
from lmkv_ray.tiers.cipher import Cipher, load_cipher, suite_of
from lmkv_ray.tiers.clears import CLEAR_SECONDS, Unheard
from lmkv_ray.tiers.counters import RemoteCounters
from lmkv_ray.tiers.format import PAGE
from lmkv_ray.tiers.remote.attempts import PATIENCE_SECONDS, Attempts
from lmkv_ray.tiers.remote.clears import SharedClears
from lmkv_ray.tiers.remote.objects import Objects, TooLargeError, open_objects
from lmkv_ray.tiers.remote.package import header_of, object_bytes, pack, unpack
from lmkv_ray.tiers.remote.recent import Known, Recent, Stored
from lmkv_ray.tiers.remote.turns import Turns
from lmkv_ray.waits import all_ended, to_the_end

IN_FLIGHT = 16
"""Requests at a time for chunks, and as many for questions."""
WIDEST_STEP = 256
"""Keys that one step of a lookup asks for: 1, then twice as many in each step."""
STORE_SECONDS = 30.0
QUESTION_SECONDS = 5.0
PENDING_BYTES = 128 << 20
"""Chunks that wait or are being sent, all together; past it they are not stored."""


class RemoteTier:
    """See ``Tier``. Made by ``open``."""

    name = "remote"
    capabilities = TierCapabilities(shared=True, instant=False)

    def __init__(self, objects: Objects, cipher: Cipher | None, clock: Clock) -> None:
        self._clock = clock
        self._objects = objects
        self._cipher = cipher
        self._suite = suite_of(cipher)
        self._clears = SharedClears(objects, clock)
        self._recent = Recent(clock)
        self._counters = RemoteCounters()
        self._try = Attempts(self._counters, objects.problem_of, self._mend, clock)
        self._transfers = Turns(IN_FLIGHT)
        self._questions = Turns(IN_FLIGHT)
        self._pending = 0
        self._mending: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def open(
        cls,
        url: str,
        options: Mapping[str, str],
        *,
        clock: Clock,
        key_file: Path | None = None,
    ) -> RemoteTier:
        """Use an object store; one that does not answer now is tried again by itself.

        Args:
            url: see ``open_objects``.
            options: see ``open_objects``.
            clock: the machine's time and chance.
            key_file: encrypts with the key in this file.

        Raises:
            ConfigError: the URL, an option or the key file is wrong.
            UnsupportedError: a package is missing.
        """
        return await cls.over(open_objects(url, options), load_cipher(key_file), clock)

    @classmethod
    async def over(cls, objects: Objects, cipher: Cipher | None, clock: Clock) -> RemoteTier:
        """As ``open``, with a store and a cipher that are there already."""
        tier = cls(objects, cipher, clock)
        # What is cleared from now on is news, for memory too.
        await tier._try(tier._clears.refresh(PATIENCE_SECONDS))
        return tier

    async def lookup(self, keys: KeyArray, within: float) -> npt.NDArray[np.bool_]:
        """See ``Tier``. What the store does not answer in time counts as not there."""
        listed, request = key_list(keys), object()
        held = np.zeros(len(keys), np.bool_)
        deadline = self._clock.monotonic() + min(within, QUESTION_SECONDS)
        begin, step = 0, 1
        while begin < len(listed) and self._try.usable:
            part = listed[begin : begin + step]
            asked = [asyncio.create_task(self._known(key, request, deadline)) for key in part]
            await _finish(asked)
            there = [self._is_there(task.result()) for task in asked]
            held[begin : begin + len(part)] = there
            if not all(there):
                held[begin + there.index(False) :] = False
                break
            begin, step = begin + step, min(2 * step, WIDEST_STEP)
        return held if self._try.usable else np.zeros(len(keys), np.bool_)

    async def fetch(self, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """See ``Tier``."""
        deadline = self._clock.monotonic() + fetch.within
        positions, request = range(len(fetch.keys)), object()
        tasks = [asyncio.create_task(self._read(fetch, i, request, deadline)) for i in positions]
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
        request = object()
        tasks = [asyncio.create_task(self._store_bounded(chunk, request)) for chunk in chunks]
        await _finish(tasks)
        return [task.result() for task in tasks]

    async def clear(self, space: int | None, number: int) -> None:
        """See ``Tier``. For all clusters that share the store; its objects stay until they
        expire.
        """
        self._clears.told(space, number)
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

    @property
    def unheard(self) -> list[Unheard]:
        """See ``Tier``."""
        return self._clears.unheard

    def heard(self, clear: Unheard) -> None:
        """See ``Tier``."""
        self._clears.heard(clear)

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

    async def _known(self, key: bytes, request: object, deadline: float) -> Known | None:
        """What is known of a chunk, or what the store says; None: it does not."""
        known = self._recent.get(key)
        if known is not None:
            return known
        async with self._questions.turn(request):
            left = deadline - self._clock.monotonic()
            if left <= 0 or not self._try.usable:
                return None
            self._counters.asked += 1
            answer = await self._try(self._ask(key, left), left)
        return None if isinstance(answer, Exception) else self._recent.put(key, answer)

    def _is_there(self, known: Known | None) -> bool:
        """Whether a chunk can be fetched."""
        stored = known.stored if known is not None else None
        return stored is not None and not self._clears.covers(stored.space, stored.mark)

    async def _ask(self, key: bytes, within: float) -> Stored | None:
        await self._clears.refresh(within)
        found = await self._objects.beginning(self._name(key), PAGE, within)
        header = header_of(*found, key, self._cipher) if found is not None else None
        return None if header is None else Stored(header.label.space, header.mark)

    async def _read(self, fetch: Fetch, position: int, request: object, deadline: float) -> Outcome:
        key = fetch.keys[position].tobytes()
        destination = fetch.destinations[position]
        async with self._transfers.turn(request):
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return Outcome(position, failure=Failure.LATE)
            if not self._try.usable:
                return Outcome(position, failure=Failure.LOST, detail=self._try.problem or "")
            most = object_bytes(len(destination), self._cipher)
            answer = await self._try(self._get(key, most, left), left)
            if isinstance(answer, Exception):
                self._recent.forget(key)
                if isinstance(answer, FileNotFoundError):
                    return Outcome(position, failure=Failure.MISSING)
                if isinstance(answer, TooLargeError):
                    return Outcome(position, failure=Failure.TOO_LARGE, detail=str(answer))
                if isinstance(answer, TimeoutError):
                    return Outcome(position, failure=Failure.LATE)
                return Outcome(
                    position, failure=Failure.LOST, detail=self._objects.problem_of(answer)
                )
            land = partial(unpack, memoryview(answer), key, self._cipher, destination)
            landed = await to_the_end(land)
            if not isinstance(landed, Failure):
                header, checksum = landed
                if not self._clears.covers(header.label.space, header.mark):
                    return Outcome(position, header.label.nbytes, checksum)
                # Not removed: it makes room for the next one, and it is that one already if its
                # writer knows of a clear that we have not heard of yet.
                self._recent.forget(key)
                return Outcome(position, failure=Failure.MISSING)
            if landed is not Failure.TOO_LARGE:  # no reader has any use for it
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
            await self._clock.sleep(self._try.pause)
            clears = self._clears.pending.items()
            await self._try(self._clears.carry_out(clears, QUESTION_SECONDS))
            self._recent.clear()  # it may have lost something

    async def _get(self, key: bytes, most: int, within: float) -> Any:
        await self._clears.refresh(within)
        return await self._objects.get(self._name(key), most, within)

    async def _store_bounded(self, chunk: TierChunk, request: object) -> bool:
        nbytes = len(chunk.data)
        if self._pending and self._pending + nbytes > PENDING_BYTES:
            self._counters.store_busy += 1
            return False
        self._pending += nbytes
        try:
            return await self._store(chunk, request)
        finally:
            self._pending -= nbytes

    async def _store(self, chunk: TierChunk, request: object) -> bool:
        async with self._transfers.turn(request):
            if not self._try.usable or not self._clears.allows(chunk.space) or not chunk.intact():
                return False
            deadline = self._clock.monotonic() + QUESTION_SECONDS
            known = await self._known(chunk.key, request, deadline)
            if known is None:
                return False
            if self._is_there(known):
                self._counters.store_known += 1
                return True
            # Read before the chunk is looked at: a clear that comes meanwhile covers it.
            stored = Stored(chunk.space, self._clears.mark(chunk.space))
            if not chunk.intact() or not self._clears.allows(chunk.space):
                self._counters.store_changed += 1
                return False
            # Sent from a copy that is known to be whole: what is sent is published at once.
            parts = await to_the_end(partial(pack, chunk, self._cipher, stored.mark, self._clock))
            if not chunk.intact() or not self._clears.allows(chunk.space):
                self._counters.store_changed += 1
                return False
            answer = await self._try(self._objects.put(self._name(chunk.key), parts, STORE_SECONDS))
            if isinstance(answer, Exception):
                self._counters.store_failed += 1
                return False
            self._recent.put(chunk.key, stored)
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
