"""The Ray actor that knows who holds what, and sees to it that every node has a shard."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

import msgspec
import ray

from lmkv_ray.actors.launch import Handle, kill, start
from lmkv_ray.actors.loops import forever
from lmkv_ray.actors.names import DIRECTORY, shard_name
from lmkv_ray.actors.peers import in_time
from lmkv_ray.actors.shard import start_shard
from lmkv_ray.actors.wire import CacheStatus, ShardStatus
from lmkv_ray.config import Settings
from lmkv_ray.directory import DirectoryState
from lmkv_ray.keys import key_array
from lmkv_ray.messages import Delta, decode, encode

logger = logging.getLogger(__name__)

SHARD_SECONDS = 2.0
"""How long a shard may take to answer the directory."""


def start_directory(settings: Settings) -> Handle:
    """The directory, started if there is none. Blocks."""
    return start(DirectoryActor, DIRECTORY, settings.ray_namespace, (settings,))


class DirectoryActor:
    """Holds no truth: it may be killed at any time, and is rebuilt from the shards' snapshots.

    Args:
        settings: of the cache; shards are started with them.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        self._settings = settings
        self._state = DirectoryState(settings.directory_capacity)
        self._shards: dict[str, Handle] = {}
        self._clearing = 0
        self._owed: dict[str, set[bytes]] = {}
        """Clears that a node has not carried out yet; nobody is sent to it meanwhile."""
        self._task = asyncio.create_task(
            forever("reconciling shards", settings.reconcile_seconds, self._reconcile)
        )

    async def delta(self, message: bytes) -> bytes:
        """``Delta`` -> ``DeltaReply``."""
        return encode(self._state.delta(decode(message, Delta), time.monotonic()))

    async def lookup(self, keys: bytes, node_id: str) -> bytes:
        """Which other nodes hold which of a run of keys: a list of ``Holding``."""
        if self._clearing:
            return msgspec.msgpack.encode([])
        found = self._state.lookup(key_array(keys), node_id)
        return msgspec.msgpack.encode([h for h in found if h.node_id not in self._owed])

    async def clear(self, space: bytes) -> bytes:
        """Clear a space (8 bytes; none: all) on all nodes.

        Returns when every shard that answers has done so; the others do before anybody is sent
        to them again.
        """
        # Nobody is sent anywhere meanwhile: a node that is cleared already would be refilled.
        self._clearing += 1
        try:
            if not self._shards:  # just started
                await self._reconcile()
            for node_id in self._shards:
                self._owed.setdefault(node_id, set()).add(space)
            await self._pay()
        finally:
            self._clearing -= 1
        return b""

    async def status(self) -> bytes:
        """``CacheStatus``."""
        shards = dict(self._shards)
        answers = await asyncio.gather(
            *(in_time(shard.status.remote(), SHARD_SECONDS) for shard in shards.values())
        )
        found = dict(zip(shards, answers, strict=True))
        return encode(
            CacheStatus(
                nodes=[decode(a, ShardStatus) for a in found.values() if a is not None],
                silent=[node_id for node_id, a in found.items() if a is None],
                directory_chunks=len(self._state.table),
            )
        )

    async def _pay(self) -> None:
        owed = [(node_id, space) for node_id, spaces in self._owed.items() for space in spaces]
        shards = [(self._shards[node_id], space) for node_id, space in owed]
        answers = await asyncio.gather(
            *(in_time(shard.clear_here.remote(space), SHARD_SECONDS) for shard, space in shards)
        )
        for (node_id, space), answer in zip(owed, answers, strict=True):
            if answer is not None and node_id in self._owed:
                self._owed[node_id].discard(space)
        self._owed = {node_id: spaces for node_id, spaces in self._owed.items() if spaces}

    async def _reconcile(self) -> None:
        # Before asking Ray: a node that joins meanwhile must not look dead.
        known = {node.node_id for node in self._state.nodes(time.monotonic())} | set(self._shards)
        nodes = await asyncio.to_thread(ray.nodes)
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        await self._drop(known - alive)
        # Asking again for those there are finds the ones that were ended by somebody.
        handles = await asyncio.gather(
            *(asyncio.to_thread(start_shard, self._settings, node_id) for node_id in alive)
        )
        self._shards = dict(zip(alive, handles, strict=True))
        await self._pay()

    async def _drop(self, dead: Iterable[str]) -> None:
        for node_id in dead:
            logger.info("lmkv_ray: node %s is gone", node_id)
            self._state.node_lost(node_id)
            self._shards.pop(node_id, None)
            self._owed.pop(node_id, None)
            await asyncio.to_thread(kill, shard_name(node_id), self._settings.ray_namespace)
