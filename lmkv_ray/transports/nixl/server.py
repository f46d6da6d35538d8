"""The end of NIXL at the shard that is read from: says where chunks are, and their checksums."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from lmkv_ray.arena import ArenaReader, Summed
from lmkv_ray.clock import Clock
from lmkv_ray.errors import TransportError
from lmkv_ray.host import host_id
from lmkv_ray.keys import KeyArray, key_array
from lmkv_ray.messages import Message, decode, encode
from lmkv_ray.orders import Offer
from lmkv_ray.transports.chunk_reader import CHANGED, MISSING
from lmkv_ray.transports.nixl.helper import Helper, HelperError
from lmkv_ray.transports.nixl.wire import NAME, PeerData, Ready, Register, Registered

REGISTER_SECONDS = 20.0
"""Bounds a ``locate``, whose caller may have gone long before."""


class Locate(Message, frozen=True):
    """A reader's question: where are these chunks?"""

    keys: bytes
    """16 bytes each."""
    known: str
    """``Located.version`` of what the reader knows; empty: nothing."""


class Located(Message, frozen=True):
    """Where chunks are, one number for each key that was asked for."""

    agent: str
    version: str
    """Names this state of the agent's registered memory. A reader says it in ``Locate.known``, so
    that ``metadata`` is sent only when it has changed."""
    metadata: bytes
    """Of the agent; empty if the reader knows it."""
    data: PeerData
    nbytes: bytes
    """int64: sizes, or ``MISSING`` or ``CHANGED``."""
    offsets: bytes
    """uint64, from ``PeerData.address``."""
    generations: bytes
    """uint64."""
    checksums: bytes
    """uint64, never 0 for a chunk that is there."""


class NixlServer:
    """Answers ``Locate``. The bytes are read without this process. See ``Server``.

    Args:
        reader: our arena.
        helper: a process that serves it.
        note: ``ArenaWriter.set_checksum``; called on the event loop.
        clock: measures deadlines.
    """

    name = NAME

    def __init__(
        self,
        reader: ArenaReader,
        helper: Helper,
        note: Callable[[int, int, int], None],
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._host = host_id()
        self._reader = reader
        self._helper = helper
        self._note = note
        self._registering = asyncio.Lock()
        self._agent = ""
        self._extents: frozenset[int] = frozenset()
        self._metadata = b""

    def offer(self, reader: str) -> Offer:
        """Whether there can be a process that serves READs; it is started for a reader on another
        host, before that one needs it.
        """
        if reader not in ("", self._host):
            self._helper.start()
        return Offer(obstacle=self._helper.problem)

    async def answer(self, question: bytes) -> bytes:
        """``Located`` for ``Locate``.

        Chunks without a checksum get one now, and it is noted: 0.1 ms a MiB, once a chunk.

        Raises:
            TransportError: peers cannot read from here.
        """
        locate = decode(question, Locate)
        found, computed = await asyncio.to_thread(self._look_up, key_array(locate.keys))
        async with self._registering:
            ready = await self._register(self._extents_of(found))
            version = f"{ready.agent}/{len(self._extents)}"  # they are only added
            metadata = self._metadata if locate.known != version else b""
        self._helper.serve()
        for slot, generation, value in computed:
            self._note(slot, generation, value)
        located = Located(
            agent=ready.agent,
            version=version,
            metadata=metadata,
            data=PeerData(address=ready.data, extent_bytes=self._reader.geometry.extent_bytes),
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
