"""What a shard sees of the rest of the cluster. Every call ends in time, whoever is dead."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Any

from lmkv_ray.actors.named import NamedActor
from lmkv_ray.actors.names import shard_name
from lmkv_ray.actors.parts import SILENT_SECONDS, Directory
from lmkv_ray.actors.wire import PeerAddress, Take, Taken
from lmkv_ray.directory import Holding
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import decode, encode
from lmkv_ray.transports import PeerInfo, host_id
from lmkv_ray.transports.select import AGAIN_SECONDS


class RayPeers:
    """The other shards, by their names.

    Args:
        namespace: Ray's.
        node_id: our own.
        directory: who knows them.
    """

    def __init__(self, namespace: str, node_id: str, directory: Directory) -> None:
        self.cleared = 0
        """The last clear that our own shard has carried out: nobody who missed it is of use."""
        self._namespace = namespace
        self._node_id = node_id
        self._directory = directory
        self._actors: dict[str, NamedActor] = {}
        self._peers: dict[str, tuple[float, PeerInfo]] = {}
        """And when they said so."""

    async def lookup(self, keys: bytes, within: float) -> list[Holding] | None:
        """Who holds what; None if the directory does not answer in time."""
        return await self._directory.lookup(keys, self._node_id, self.cleared, within)

    async def peer(self, node_id: str, within: float) -> PeerInfo | None:
        """How to read from a node; None if it does not answer in time."""
        at, known = self._peers.get(node_id, (0.0, None))
        lasting = known is not None and known.nixl_obstacle is None
        if known is not None and (lasting or time.monotonic() < at + AGAIN_SECONDS):
            return known
        actor = self._actor(node_id)
        deadline = time.monotonic() + min(within, SILENT_SECONDS)
        handle = await actor.handle(deadline - time.monotonic())
        if handle is None:
            return None
        answer = await actor.ask("address", host_id(), within=deadline - time.monotonic())
        if answer is None:
            return None
        address = decode(answer, PeerAddress)

        def read(keys: bytes) -> Awaitable[Any]:
            batch: Awaitable[Any] = handle.read.remote(keys)
            return batch

        def locate(keys: bytes, known: str) -> Awaitable[bytes]:
            located: Awaitable[bytes] = handle.locate.remote(keys, known)
            return located

        peer = PeerInfo(
            node_id=node_id,
            host=address.host,
            arena_path=address.arena_path,
            arena_id=address.arena_id,
            read=read,
            locate=locate,
            nixl_obstacle=address.nixl_obstacle,
        )
        self._peers[node_id] = time.monotonic(), peer
        return peer

    async def take(self, node_id: str, take: Take) -> list[bytes]:
        """Ask a node to fetch chunks; which it has then, none if it does not answer in time."""
        within = take.within + SILENT_SECONDS
        answer = await self._actor(node_id).ask("take", encode(take), within=within)
        return [] if answer is None else key_list(key_array(decode(answer, Taken).keys))

    def forget(self, node_id: str) -> None:
        """What is known about a node was wrong."""
        self._peers.pop(node_id, None)
        if not self._actor(node_id).is_sought:
            del self._actors[node_id]

    def _actor(self, node_id: str) -> NamedActor:
        return self._actors.setdefault(node_id, NamedActor(shard_name(node_id), self._namespace))
