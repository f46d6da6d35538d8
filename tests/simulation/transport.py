"""A simulated network card: it reads the memory of another machine without asking anybody there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaReader, checksum
from lmkv_ray.clock import Clock
from lmkv_ray.errors import TransportError
from lmkv_ray.fetch import Failure, Fetch, Outcome, failed, groups
from lmkv_ray.orders import Offer
from lmkv_ray.transports import Answer, Capabilities, PeerInfo
from lmkv_ray.transports.windows import in_windows

WINDOW_BYTES = 256 << 10
IN_FLIGHT = 2


class GoneError(Exception):
    """The peer's process has ended, and its memory with it."""


@dataclass(frozen=True)
class Wire:
    """The network between two machines, as a card sees it.

    Args:
        travel: (from, to, bytes) returns when that many bytes have arrived; never if they are lost.
        memory: the arena of a peer as it is now; None once the peer has ended.
        damage: the chance that a chunk arrives with a byte that is another one.
        pace: mean seconds between two moments at which the card reads the halves of a chunk.
    """

    travel: Callable[[str, str, int], Awaitable[None]]
    memory: Callable[[PeerInfo], ArenaReader | None]
    damage: Callable[[], float]
    pace: float = 0.0001


class SimulatedServer:
    """The memory that is read; see ``Server``."""

    name = "simulated"

    def offer(self, reader: str) -> Offer:
        """See ``Server``."""
        return Offer()

    async def answer(self, question: bytes) -> Answer:
        """See ``Server``."""
        raise TransportError("A card asks nothing.", next_step="look for a bug of the simulation.")


class SimulatedTransport:
    """Reads each chunk in two halves, while the peer goes on; see ``Transport``.

    As with RDMA, the peer's process may be frozen meanwhile; what it replaces between the halves
    arrives torn; and a destination holds half a chunk until the other half has come.

    Args:
        machine: the name of the machine that fetches.
        wire: the network.
        clock: measures deadlines.
        random: when the halves are read, and which bytes are damaged.
    """

    name = "simulated"
    capabilities = Capabilities(same_host=False, one_sided=True, verified=True)

    def __init__(self, machine: str, wire: Wire, clock: Clock, random: Random) -> None:
        self._machine = machine
        self._wire = wire
        self._clock = clock
        self._random = random

    def obstacle(self, peer: PeerInfo) -> str | None:
        """See ``Transport``."""
        return "the peer has ended" if self._wire.memory(peer) is None else None

    async def fetch(self, peer: PeerInfo, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """See ``Transport``."""
        deadline = self._clock.monotonic() + fetch.within
        windows = groups([len(d) for d in fetch.destinations], WINDOW_BYTES)
        bring = partial(self._bring, peer, fetch, deadline)
        async with contextlib.aclosing(in_windows(windows, bring, IN_FLIGHT)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def _bring(
        self, peer: PeerInfo, fetch: Fetch, deadline: float, window: range
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        try:
            async with asyncio.timeout(max(deadline - self._clock.monotonic(), 0)):
                await asyncio.sleep(0)
                for position in window:
                    outcomes.append(await self._read(peer, fetch, position))  # noqa: PERF401
        except TimeoutError:
            outcomes += failed(window[len(outcomes) :], Failure.LATE)
        except GoneError:
            outcomes += failed(window[len(outcomes) :], Failure.LOST, "the peer has ended")
        return outcomes

    async def _read(self, peer: PeerInfo, fetch: Fetch, position: int) -> Outcome:
        await self._wire.travel(self._machine, peer.node_id, 0)
        memory = self._memory(peer)
        hits = memory.lookup(fetch.keys[position : position + 1])
        if not hits.found[0]:
            return Outcome(position, failure=Failure.MISSING)
        start, nbytes = int(hits.offsets[0]), int(hits.nbytes[0])
        destination = fetch.destinations[position]
        if nbytes > len(destination):
            return Outcome(position, failure=Failure.TOO_LARGE)
        expected = int(memory.summed(hits)[0][0])
        if not memory.unchanged(hits.slots, hits.generations)[0]:
            return Outcome(position, failure=Failure.CHANGED)  # it may be another chunk's checksum
        for part in (slice(0, nbytes // 2), slice(nbytes // 2, nbytes)):
            await self._clock.sleep(self._random.expovariate(1 / self._wire.pace))
            sent = self._memory(peer).data[start:][part].copy()
            await self._wire.travel(peer.node_id, self._machine, len(sent))
            destination[part] = self._arrived(sent)
        if checksum(destination[:nbytes]) == expected:
            return Outcome(position, nbytes, expected)
        same = self._memory(peer).unchanged(hits.slots, hits.generations)[0]
        return Outcome(position, failure=Failure.CORRUPT if same else Failure.CHANGED)

    def _memory(self, peer: PeerInfo) -> ArenaReader:
        memory = self._wire.memory(peer)
        if memory is None or memory.arena_id != peer.arena_id:
            raise GoneError
        return memory

    def _arrived(self, sent: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if len(sent) and self._random.random() < self._wire.damage():
            sent[self._random.randrange(len(sent))] ^= 0xFF
        return sent
