"""The peer's side of a READ: where chunks are, and what their bytes must be.

It is asked by who does not know its tables yet, and about chunks whose checksum was not noted; all
else peers read by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import xxhash

from lmkv_ray.arena import ArenaReader, Summed
from lmkv_ray.clock import Clock
from lmkv_ray.errors import TransportError
from lmkv_ray.keys import KeyArray, key_array
from lmkv_ray.messages import Message, encode
from lmkv_ray.transports.chunk_reader import CHANGED, MISSING
from lmkv_ray.transports.nixl.helper import Helper, HelperError
from lmkv_ray.transports.nixl.wire import Ready, Register, Registered, Tables

REGISTER_SECONDS = 20.0
"""Bounds a ``locate``, whose caller may have gone long before."""


class Located(Message, frozen=True):
    """Where chunks are, one number for each key that was asked for."""

    agent: str
    version: str
    """Of what is known of that agent: to be said with the next question."""
    metadata: bytes
    """Of the agent; empty if the caller knows it."""
    tables: Tables | None
    """None if the caller knows them."""
    nbytes: bytes
    """int64: sizes, or ``MISSING`` or ``CHANGED``."""
    offsets: bytes
    """uint64, from ``Tables.data``."""
    generations: bytes
    """uint64."""
    checksums: bytes
    """uint64, never 0 for a chunk that is there."""


class NixlSource:
    """Answers ``locate`` of peers. The bytes are read without us.

    Args:
        reader: our arena.
        helper: a process that serves it.
        note: ``ArenaWriter.set_checksum``; called on the event loop.
        clock: measures deadlines.
    """

    def __init__(
        self,
        reader: ArenaReader,
        helper: Helper,
        note: Callable[[int, int, int], None],
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._reader = reader
        self._helper = helper
        self._note = note
        self._registering = asyncio.Lock()
        self._agent = ""
        self._extents: frozenset[int] = frozenset()
        self._metadata = b""

    @property
    def obstacle(self) -> str | None:
        """Why peers cannot read from here."""
        return self._helper.problem

    def start(self) -> None:
        """Have the process that serves reads before the first peer needs it."""
        self._helper.start()

    async def locate(self, keys: bytes, known: str) -> bytes:
        """``Located`` for keys of 16 bytes each.

        Chunks without a checksum get one now, and it is noted: 0.1 ms a MiB, once a chunk.

        Args:
            keys: which.
            known: ``Located.version`` of what the caller knows; empty: nothing.

        Raises:
            TransportError: peers cannot read from here.
        """
        found, computed = await asyncio.to_thread(self._look_up, key_array(keys))
        async with self._registering:
            ready = await self._register(self._extents_of(found))
            sizes = self._reader.slot_bytes
            unregistered = np.ones(len(sizes), np.bool_)
            unregistered[list(self._extents)] = False
            sizes[unregistered] = 0
            version = f"{ready.agent}/{xxhash.xxh3_64_hexdigest(sizes.tobytes())}"
            news = known != version
            metadata = self._metadata if news else b""
        self._helper.serve()
        for slot, generation, value in computed:
            self._note(slot, generation, value)
        geometry = self._reader.geometry
        tables = Tables(
            capacity=geometry.capacity,
            extent_bytes=geometry.extent_bytes,
            slot_bytes=sizes.tobytes(),
            index=ready.index,
            slots=ready.slots,
            data=ready.data,
        )
        located = Located(
            agent=ready.agent,
            version=version,
            metadata=metadata,
            tables=tables if news else None,
            **found,
        )
        return encode(located)

    def _extents_of(self, found: dict[str, bytes]) -> frozenset[int]:
        """Where chunks lie."""
        offsets = np.frombuffer(found["offsets"], np.uint64)
        there = np.frombuffer(found["nbytes"], np.int64) >= 0
        extent_bytes = np.uint64(self._reader.geometry.extent_bytes)
        return frozenset((offsets[there] // extent_bytes).tolist())

    def _look_up(self, keys: KeyArray) -> tuple[dict[str, bytes], list[Summed]]:
        """In a thread: the arrays of ``Located``, and the new checksums."""
        reader = self._reader
        hits = reader.lookup(keys)
        checksums, computed = reader.summed(hits)
        nbytes = np.where(hits.found, hits.nbytes, MISSING)
        positions = np.flatnonzero(hits.found)
        same = reader.unchanged(hits.slots[positions], hits.generations[positions])
        nbytes[positions[~same]] = CHANGED
        arrays = {
            "nbytes": nbytes.tobytes(),
            "offsets": hits.offsets.astype(np.uint64).tobytes(),
            "generations": hits.generations.tobytes(),
            "checksums": checksums.tobytes(),
        }
        return arrays, computed

    async def _register(self, extents: frozenset[int]) -> Ready:
        """Make sure that peers can read from extents; by which agent."""
        ready = self._helper.agent
        if ready is None or ready.agent != self._agent:
            self._extents = frozenset()
        elif extents <= self._extents:
            return ready
        wanted = self._extents | extents
        command = Register(extents=sorted(wanted))
        try:
            result = await self._helper.call(command, self._clock.monotonic() + REGISTER_SECONDS)
        except HelperError as error:
            raise TransportError(
                f"NIXL cannot read from here: {error}.",
                next_step="set LMKV_TRANSPORT=object_store, or see the shard's log.",
            ) from error
        ready = self._helper.agent
        if ready is None or not isinstance(result, Registered):
            raise TransportError(
                "The NIXL process of this shard has just died.",
                next_step="nothing: it is started again for the next fetch.",
            )
        self._agent, self._extents, self._metadata = ready.agent, wanted, result.metadata
        return ready
