"""The Ray actors that know who holds what, and see to it that every node has a shard."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType

import msgspec
import ray

from lmkv_ray.actors import log
from lmkv_ray.actors.launch import Handle, actor_names, kill, leaving_nodes, start
from lmkv_ray.actors.loops import forever
from lmkv_ray.actors.named import in_time
from lmkv_ray.actors.names import directory_name, shard_name
from lmkv_ray.actors.parts import positions_by_part
from lmkv_ray.actors.shard import start_shard
from lmkv_ray.actors.wire import CacheStatus, DirectoryStatus, Drain, Drained, ShardStatus
from lmkv_ray.config import Settings
from lmkv_ray.directory import DirectoryState, Holding, merge
from lmkv_ray.keys import key_array
from lmkv_ray.messages import Cleared, Clears, Delta, decode, encode

logger = logging.getLogger(__name__)

SHARD_SECONDS = 2.0
"""How long another actor may take to answer the directory."""
HEAD = "node:__internal_head__"
"""What Ray says that only the head node has."""
FAREWELL_SHARE = 0.8
"""Part of the time left to a node in which its shard hands over its chunks."""


def start_directory(settings: Settings, part: int = 0) -> Handle:
    """A part of the directory, started if there is none; part 0 starts the others. Blocks."""
    name, namespace = directory_name(part), settings.ray_namespace
    return start(DirectoryActor, name, namespace, (settings, part))


class DirectoryActor:
    """Holds no truth: it may be killed at any time, and is rebuilt from the shards' snapshots.

    Every part knows its share of the keys. Part 0 also keeps the actors of the cache running and
    orders clears.

    Args:
        settings: of the cache; its other actors are started with them.
        part: which one this is.
    """

    async def __init__(self, settings: Settings, part: int) -> None:  # type: ignore[misc]
        log.show()
        self._settings = settings
        self._part = part
        self._capacity = -(-settings.directory_capacity // settings.directory_shards)
        self._state = DirectoryState(self._capacity, orders_clears=part == 0)
        self._shards: dict[str, Handle] = {}
        self._doubtful: set[str] = set()
        """Nodes whose shard did not answer: maybe it was ended, and there is a new one."""
        self._others: list[Handle] = []
        self._farewells: dict[str, asyncio.Task[None]] = {}
        """Of nodes that leave; a shard is not started there again."""
        self._task = asyncio.create_task(
            forever("reconciling shards", settings.reconcile_seconds, self._reconcile)
        )

    async def delta(self, message: bytes) -> bytes:
        """``Delta`` -> ``DeltaReply``."""
        return encode(self._state.delta(decode(message, Delta), time.monotonic()))

    async def lookup(self, keys: bytes, node_id: str, cleared: int) -> bytes:
        """Which other nodes hold which of a run of keys: a list of ``Holding``."""
        found = self._state.lookup(key_array(keys), node_id, cleared, time.monotonic())
        return msgspec.msgpack.encode(found)

    async def where(self, keys: bytes) -> bytes:
        """The same of all nodes and of engines' devices, from all parts that answer."""
        rows = key_array(keys)
        asked = positions_by_part(rows, 1 + len(self._others))
        parts = [self.part_where, *(other.part_where.remote for other in self._others)]
        answers = await asyncio.gather(
            *(
                in_time(parts[part](rows[positions].tobytes()), SHARD_SECONDS)
                for part, positions in asked.items()
            )
        )
        found = [
            (positions.tolist(), msgspec.msgpack.decode(answer, type=list[Holding]))
            for positions, answer in zip(asked.values(), answers, strict=True)
            if answer is not None
        ]
        return msgspec.msgpack.encode(merge(found))

    async def part_where(self, keys: bytes) -> bytes:
        """What this part knows of ``where``."""
        return msgspec.msgpack.encode(self._state.where(key_array(keys), time.monotonic()))

    async def rooms(self, node_id: str) -> bytes:
        """Bytes of other nodes' chunks that each node but this one would take."""
        return msgspec.msgpack.encode(self._state.rooms(node_id, time.monotonic()))

    async def clear(self, space: bytes, number: int = 0) -> bytes:
        """Clear a space (8 bytes; none: all) on all nodes: ``Cleared``.

        A ``number`` is that of a clear which a node found in a store that several share: it is
        ordered here once, under this number if that is a new one. So caches that share a store
        do not answer each other's clears for ever.

        Returns when every shard that answers serves nothing of it any more. The others do when they
        speak again; nobody is sent to them before.
        """
        if not self._shards:  # just started
            await self._reconcile()
        if number and self._state.clears.knows(number):
            return encode(Cleared(before=number))
        while True:
            clear = self._state.clears.new(space, number or time.time_ns())
            # All that a node owes: it may have missed others, which a higher number would hide.
            owed = {n: (encode(Clears(clears=self._state.owed(n))),) for n in self._shards}
            answers = await self._ask_shards("catch_up", owed)
            cleared = [decode(a, Cleared) for a in answers.values() if a is not None]
            for answer in cleared:
                self._state.clears.heard(answer.before)
            # A clock that was turned back: to those shards it was no news.
            if all(answer.before <= clear.number for answer in cleared):
                pending = sorted({name for answer in cleared for name in answer.pending})
                return encode(Cleared(before=clear.number, pending=pending))

    async def status(self) -> bytes:
        """``CacheStatus``."""
        shards, parts = await asyncio.gather(
            self._ask_shards("status"),
            asyncio.gather(
                self.part_status(),
                *(in_time(p.part_status.remote(), SHARD_SECONDS) for p in self._others),
            ),
        )
        return encode(
            CacheStatus(
                nodes=[decode(a, ShardStatus) for a in shards.values() if a is not None],
                silent=[node_id for node_id, a in shards.items() if a is None],
                directory=[decode(a, DirectoryStatus) for a in parts if a is not None],
            )
        )

    async def part_status(self) -> bytes:
        """``DirectoryStatus``."""
        nodes = self._state.nodes(time.monotonic())
        return encode(
            DirectoryStatus(
                part=self._part,
                nodes=len(nodes),
                unsynced=sum(not node.synced for node in nodes),
                chunks=len(self._state.table),
                capacity=self._capacity,
            )
        )

    async def _ask_shards(
        self, method: str, args: Mapping[str, tuple[object, ...]] = MappingProxyType({})
    ) -> dict[str, bytes | None]:
        """Call a method of all shards, with arguments by node."""
        shards = dict(self._shards)
        answers = await asyncio.gather(
            *(
                in_time(getattr(shard, method).remote(*args.get(node_id, ())), SHARD_SECONDS)
                for node_id, shard in shards.items()
            )
        )
        for node_id, answer in zip(shards, answers, strict=True):
            if answer is None:
                self._doubtful.add(node_id)
        return dict(zip(shards, answers, strict=True))

    async def _reconcile(self) -> None:
        # Before asking Ray: a node that joins meanwhile must not look dead.
        known = {node.node_id for node in self._state.nodes(time.monotonic())} | set(self._shards)
        nodes = await asyncio.to_thread(ray.nodes)
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        for node_id in known - alive:
            logger.info("lmkv_ray: node %s is gone", node_id)
            self._state.node_lost(node_id)
        leaving = await asyncio.to_thread(leaving_nodes)
        if self._part == 0:
            await self._end(known - alive)
            await self._start(alive, leaving)
            heads = {node["NodeID"] for node in nodes if HEAD in node["Resources"]}
            self._see_off(dict.fromkeys(self._idle() - heads, math.inf) | leaving)
        own = ray.get_runtime_context().get_node_id()
        if own in leaving and own not in self._shards:
            logger.info("lmkv_ray: this node leaves; Ray starts the directory on another one")
            os._exit(1)

    def _idle(self) -> set[str]:
        """Nodes that Ray's autoscaler could have, were it not for their shard."""
        limit = self._settings.release_idle_seconds
        if limit is None:
            return set()
        now = time.monotonic()
        return {node.node_id for node in self._state.nodes(now) if node.idle > limit}

    def _see_off(self, leaving: Mapping[str, float]) -> None:
        for node_id in leaving.keys() & self._shards.keys() - self._farewells.keys():
            logger.info("lmkv_ray: node %s is about to leave", node_id)
            within = min(self._settings.drain_seconds, FAREWELL_SHARE * leaving[node_id])
            farewell = self._drain(node_id, self._shards[node_id], max(within, 0))
            self._farewells[node_id] = asyncio.create_task(farewell)

    async def _drain(self, node_id: str, shard: Handle, within: float) -> None:
        """Let a shard hand over its chunks, then end it: Ray ends a node on which nothing runs."""
        drain = encode(Drain(within=within))
        answer = await in_time(shard.drain.remote(drain), within + SHARD_SECONDS)
        if answer is not None:
            done = decode(answer, Drained)
            logger.info(
                "lmkv_ray: node %s has handed over %d chunks, %d are lost with it",
                node_id,
                done.copied,
                done.left,
            )
        self._state.node_lost(node_id)
        self._shards.pop(node_id, None)
        await asyncio.to_thread(kill, shard_name(node_id), self._settings.ray_namespace)

    async def _end(self, dead: Iterable[str]) -> None:
        for node_id in dead:
            self._shards.pop(node_id, None)
            self._farewells.pop(node_id, None)
            await asyncio.to_thread(kill, shard_name(node_id), self._settings.ray_namespace)

    async def _start(self, alive: Iterable[str], leaving: Container[str]) -> None:
        """Start what is missing: parts of the directory, and shards on nodes that stay."""
        running = set(await asyncio.to_thread(actor_names, self._settings.ray_namespace))
        for node_id, farewell in [*self._farewells.items()]:
            if farewell.done() and node_id not in leaving and shard_name(node_id) in running:
                del self._farewells[node_id]  # it was idle, and an engine has come
        parts = range(1, self._settings.directory_shards)
        if not self._others or not running.issuperset(map(directory_name, parts)):
            self._others = await asyncio.gather(
                *(asyncio.to_thread(start_directory, self._settings, part) for part in parts)
            )
        missing = [
            node_id
            for node_id in alive
            if (shard_name(node_id) in running or node_id not in leaving)
            and node_id not in self._farewells
            and (
                node_id not in self._shards
                or node_id in self._doubtful
                or shard_name(node_id) not in running
            )
        ]
        handles = await asyncio.gather(
            *(asyncio.to_thread(start_shard, self._settings, node_id) for node_id in missing)
        )
        self._shards |= zip(missing, handles, strict=True)
        self._doubtful.difference_update(missing)
