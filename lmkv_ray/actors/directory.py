"""The Ray actors of the directory. Part 0 also sees to it that every node has a shard."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Container, Iterable, Mapping

import ray

from lmkv_ray.actors import log
from lmkv_ray.actors.exporter import EXPORT_SECONDS, Exporter
from lmkv_ray.actors.launch import Handle, actor_names, kill, leaving_nodes, start
from lmkv_ray.actors.memory import GcsMemory
from lmkv_ray.actors.named import NamedActors
from lmkv_ray.actors.names import directory_name, shard_name
from lmkv_ray.actors.shard import start_shard
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.config import Settings
from lmkv_ray.directory.service import DirectoryService
from lmkv_ray.metrics.services import Sample, part_samples
from lmkv_ray.node.loops import every

logger = logging.getLogger(__name__)

HEAD = "node:__internal_head__"
"""What Ray says that only the head node has."""
FAREWELL_SHARE = 0.8
"""Part of the time left to a node in which its shard hands over its chunks."""


def start_directory(settings: Settings, part: int = 0) -> Handle:
    """A part of the directory, started if there is none; part 0 starts the others. Blocks."""
    name, namespace = directory_name(part), settings.ray_namespace
    return start(DirectoryActor, name, namespace, (settings, part))


class DirectoryActor:
    """Forwards calls to its ``DirectoryService``, and tells it which nodes there are.

    Args:
        settings: those of the cache; its other actors are started with them.
        part: which one this is.
    """

    async def __init__(self, settings: Settings, part: int) -> None:  # type: ignore[misc]
        log.show()
        self._settings = settings
        self._part = part
        neighbours = NamedActors(settings.ray_namespace)
        memory = GcsMemory(settings.ray_namespace)
        self._service = DirectoryService(settings, part, SYSTEM_CLOCK, neighbours, memory)
        try:
            await self._service.remember()
        except OSError:
            # An error here would end the actor for good; a process that ends is started again.
            logger.exception("lmkv_ray: Ray's head does not say which clears there were")
            os._exit(1)
        self._farewells: dict[str, asyncio.Task[None]] = {}
        """By node that leaves; a shard is not started there again."""
        export, seconds = Exporter(self._samples).step, settings.reconcile_seconds
        self._loops = [
            asyncio.create_task(loop)
            for loop in (
                every(seconds, "reconciling shards", self._reconcile, SYSTEM_CLOCK),
                every(EXPORT_SECONDS, "exporting metrics", export, SYSTEM_CLOCK),
            )
        ]

    def _samples(self) -> Iterable[Sample]:
        return part_samples(self._service.describe())

    async def delta(self, message: bytes) -> bytes:
        """See ``DirectoryService.delta``."""
        return self._service.delta(message)

    async def lookup(self, keys: bytes, node_id: str, cleared: int) -> bytes:
        """See ``DirectoryService.lookup``."""
        return self._service.lookup(keys, node_id, cleared)

    async def where(self, keys: bytes) -> bytes:
        """See ``DirectoryService.where``."""
        return await self._service.where(keys)

    async def part_where(self, keys: bytes) -> bytes:
        """See ``DirectoryService.part_where``."""
        return self._service.part_where(keys)

    async def rooms(self, node_id: str) -> bytes:
        """See ``DirectoryService.rooms``."""
        return self._service.rooms(node_id)

    async def clear(self, space: bytes, number: int = 0, old: bool = False) -> bytes:
        """See ``DirectoryService.clear``."""
        if not self._service.shards:  # just started
            await self._reconcile()
        return await self._service.clear(space, number, old)

    async def status(self) -> bytes:
        """See ``DirectoryService.status``."""
        return await self._service.status()

    async def story(self) -> bytes:
        """See ``DirectoryService.story``."""
        return self._service.story()

    async def part_status(self) -> bytes:
        """See ``DirectoryService.part_status``."""
        return self._service.part_status()

    async def _reconcile(self) -> None:
        """Let the nodes of the cache be those of the Ray cluster."""
        # Before asking Ray: a node that joins meanwhile must not look dead.
        known = self._service.known()
        nodes = await asyncio.to_thread(ray.nodes)
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        for node_id in known - alive:
            logger.info("lmkv_ray: node %s is gone", node_id)
            self._service.lose(node_id)
        leaving = await asyncio.to_thread(leaving_nodes)
        if self._part == 0:
            await self._end(known - alive)
            await self._start(alive, leaving)
            heads = {node["NodeID"] for node in nodes if HEAD in node["Resources"]}
            self._see_off(dict.fromkeys(self._idle() - heads, math.inf) | leaving)
        own = ray.get_runtime_context().get_node_id()
        if own in leaving and own not in self._service.shards:
            logger.info("lmkv_ray: this node leaves; Ray starts the directory on another one")
            os._exit(1)

    def _idle(self) -> set[str]:
        """Nodes that Ray's autoscaler could have, were it not for their shard."""
        limit = self._settings.release_idle_seconds
        return set() if limit is None else self._service.idle(limit)

    def _see_off(self, leaving: Mapping[str, float]) -> None:
        for node_id in leaving.keys() & self._service.shards - self._farewells.keys():
            logger.info("lmkv_ray: node %s is about to leave", node_id)
            within = min(self._settings.drain_seconds, FAREWELL_SHARE * leaving[node_id])
            farewell = self._drain(node_id, max(within, 0))
            self._farewells[node_id] = asyncio.create_task(farewell)

    async def _drain(self, node_id: str, within: float) -> None:
        """Let a shard hand over its chunks, then end it: Ray ends a node on which nothing runs."""
        await self._service.drain(node_id, within)
        await asyncio.to_thread(kill, shard_name(node_id), self._settings.ray_namespace)

    async def _end(self, dead: Iterable[str]) -> None:
        for node_id in dead:
            self._farewells.pop(node_id, None)
            await asyncio.to_thread(kill, shard_name(node_id), self._settings.ray_namespace)

    async def _start(self, alive: Iterable[str], leaving: Container[str]) -> None:
        """Start what is missing: parts of the directory, and shards on nodes that stay."""
        running = set(await asyncio.to_thread(actor_names, self._settings.ray_namespace))
        for node_id, farewell in [*self._farewells.items()]:
            if farewell.done() and node_id not in leaving and shard_name(node_id) in running:
                del self._farewells[node_id]  # it was idle, and an engine has come
        parts = [
            asyncio.to_thread(start_directory, self._settings, part)
            for part in range(1, self._settings.directory_parts)
            if directory_name(part) not in running
        ]
        kept = {
            node_id
            for node_id in alive
            if (shard_name(node_id) in running or node_id not in leaving)
            and node_id not in self._farewells
        }
        shards = [
            asyncio.to_thread(start_shard, self._settings, node_id)
            for node_id in kept
            if shard_name(node_id) not in running
        ]
        await asyncio.gather(*parts, *shards)
        self._service.shards |= kept
