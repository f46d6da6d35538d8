"""Sources: what chunks can be fetched from, outside the arena."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lmkv_ray.clock import Clock
from lmkv_ray.errors import TransportError
from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.keys import KeyArray
from lmkv_ray.node.peers import Peers
from lmkv_ray.tiers import Tier
from lmkv_ray.transports import Transports

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One source that says it holds some chunks of a run."""

    name: str
    """A node's id, or a tier's name."""
    positions: Sequence[int]
    """Which of the keys asked for, ascending."""
    fetch: Callable[[Fetch], AsyncGenerator[Outcome, None]]
    """Promises what ``Transport.fetch`` does."""


class Finder(Protocol):
    """Knows one kind of sources."""

    async def find(self, keys: KeyArray, within: float) -> list[Source] | None:
        """The sources, the best first; None: the finder got no answer in time."""
        ...


class TierFinder:
    """A tier of this node.

    Args:
        tier: which.
        readable: whether it may be read now. It outlives memory, and may hold what was cleared
            while we were away.
    """

    def __init__(self, tier: Tier, readable: Callable[[], bool]) -> None:
        self._tier = tier
        self._readable = readable

    async def find(self, keys: KeyArray, within: float) -> list[Source] | None:
        """See ``Finder``."""
        if not self._readable():
            return []
        held = np.flatnonzero(await self._tier.lookup(keys, within)).tolist()
        return [Source(self._tier.name, held, self._tier.fetch)] if held else []


class PeerFinder:
    """The shards of other nodes, as the directory knows them.

    Args:
        peers: says who holds what, and how to read from them.
        transports: chooses how chunks are fetched from a peer.
        clock: the node's.
    """

    def __init__(self, peers: Peers, transports: Transports, clock: Clock) -> None:
        self._peers = peers
        self._transports = transports
        self._clock = clock

    async def find(self, keys: KeyArray, within: float) -> list[Source] | None:
        """See ``Finder``."""
        holdings = await self._peers.lookup(keys.tobytes(), within)
        if holdings is None:
            return None
        # Of nodes that hold the same the first is asked: not the same one by all readers.
        shuffled = sorted(holdings, key=lambda _: self._clock.random_bytes(8))
        return [self.source(holding.node_id, holding.positions) for holding in shuffled]

    def source(self, node_id: str, positions: Sequence[int]) -> Source:
        """One node, whether or not the directory names it."""
        return Source(node_id, positions, lambda fetch: self._fetch(node_id, fetch))

    async def _fetch(self, node_id: str, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        deadline = self._clock.monotonic() + fetch.within
        peer = await self._peers.peer(node_id, fetch.within)
        obstacle = "it does not answer"
        if peer is not None:
            try:
                transport = self._transports.choose(peer)
            except TransportError as error:
                obstacle = str(error)
            else:
                fetch = Fetch(fetch.keys, fetch.destinations, deadline - self._clock.monotonic())
                async with contextlib.aclosing(transport.fetch(peer, fetch)) as outcomes:
                    async for outcome in outcomes:
                        if outcome.failure is Failure.LOST:
                            self._forget(node_id)
                        yield outcome
                return
        self._forget(node_id)
        for position in range(len(fetch.keys)):
            yield Outcome(position, failure=Failure.LOST, detail=obstacle)

    def _forget(self, node_id: str) -> None:
        self._peers.forget(node_id)
        self._transports.forget(node_id)


class GivenFinder:
    """One peer that holds all that is asked for: it said so itself."""

    def __init__(self, peers: PeerFinder, node_id: str) -> None:
        self._peers = peers
        self._node_id = node_id

    async def find(self, keys: KeyArray, within: float) -> list[Source] | None:
        """See ``Finder``."""
        return [self._peers.source(self._node_id, range(len(keys)))]


async def find_all(
    finders: Sequence[Finder],
    keys: KeyArray,
    deadline: float,
    clock: Clock,
    avoid: Collection[str] = (),
) -> tuple[list[Source], bool]:
    """Ask finders in turn, the quickest kind first, for the keys that have no holder yet.

    Args:
        finders: in this order.
        keys: a run of chunks.
        deadline: monotonic seconds of the clock.
        clock: the node's.
        avoid: names of sources that count as holding nothing.

    Returns:
        the sources, and whether every finder that was needed answered in time.
    """
    found: list[Source] = []
    all_answered = True
    missing = np.ones(len(keys), np.bool_)
    for finder in finders:
        left = deadline - clock.monotonic()
        asked = np.flatnonzero(missing)
        sources = await finder.find(keys[asked], left) if left > 0 else None
        if sources is None:
            all_answered = False
            continue
        for source in sources:
            if source.name in avoid:
                continue
            positions = asked[list(source.positions)]
            missing[positions] = False
            found.append(replace(source, positions=positions.tolist()))
        if not missing.any():
            break
    return found, all_answered
