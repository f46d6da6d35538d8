"""The other nodes, as a node sees them. Every call ends in time, whatever is dead."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from lmkv_ray.clock import Clock
from lmkv_ray.directory import Holding
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import decode, encode
from lmkv_ray.neighbours import Neighbours
from lmkv_ray.node.directory import SILENT_SECONDS, DirectoryClient
from lmkv_ray.orders import PeerAddress, Take, Taken
from lmkv_ray.transports import PeerInfo
from lmkv_ray.transports.select import AGAIN_SECONDS


class Peers:
    """What a node knows of other nodes' shards.

    Args:
        neighbours: the way to the shards.
        directory: knows which node holds what.
        node_id: the id of this node.
        host: the machine's ``host_id()``.
        clock: the node's.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        directory: DirectoryClient,
        node_id: str,
        host: str,
        clock: Clock,
    ) -> None:
        self.cleared = 0
        """The last clear that this node has carried out. Peers that have missed it are not asked:
        they may hold what was cleared."""
        self._neighbours = neighbours
        self._directory = directory
        self._node_id = node_id
        self._host = host
        self._clock = clock
        self._peers: dict[str, tuple[float, PeerInfo]] = {}
        """And when they said so."""

    async def lookup(self, keys: bytes, within: float) -> list[Holding] | None:
        """Which nodes hold which keys; None if the directory does not answer in time."""
        return await self._directory.lookup(keys, self._node_id, self.cleared, within)

    async def peer(self, node_id: str, within: float) -> PeerInfo | None:
        """How to read from a node; None if it does not answer in time."""
        now = self._clock.monotonic()
        at, known = self._peers.get(node_id, (0.0, None))
        if known is not None:
            lasting = all(offer.obstacle is None for offer in known.offers.values())
            if lasting or now < at + AGAIN_SECONDS:
                return known
        shard = self._neighbours.shard(node_id)
        answer = await shard.ask("address", self._host, within=min(within, SILENT_SECONDS))
        if answer is None:
            return None
        address = decode(answer, PeerAddress)

        def ask(transport: str, question: bytes) -> Awaitable[Any]:
            return shard.call("serve", transport, question)

        peer = PeerInfo(
            node_id=node_id,
            host=address.host,
            arena_id=address.arena_id,
            offers=address.offers,
            ask=ask,
        )
        self._peers[node_id] = self._clock.monotonic(), peer
        return peer

    async def take(self, node_id: str, take: Take) -> list[bytes]:
        """Ask a node to fetch chunks; the keys of those that it has then, none if it does not
        answer in time.
        """
        within = take.within + SILENT_SECONDS
        answer = await self._neighbours.shard(node_id).ask("take", encode(take), within=within)
        return [] if answer is None else key_list(key_array(decode(answer, Taken).keys))

    def forget(self, node_id: str) -> None:
        """What is known about a node was wrong."""
        self._peers.pop(node_id, None)
        self._neighbours.forget(node_id)
