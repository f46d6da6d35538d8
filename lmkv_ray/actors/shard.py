"""The Ray actor of one node: RPCs and timers around ``Shard`` and ``Staging``."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import asdict

import msgspec
import ray

from lmkv_ray.actors import log
from lmkv_ray.actors.clearing import Clearing
from lmkv_ray.actors.core import Shard, open_arena
from lmkv_ray.actors.demotion import Demotion
from lmkv_ray.actors.handover import Handover
from lmkv_ray.actors.launch import Handle, memory_of_node, start
from lmkv_ray.actors.loops import forever, until
from lmkv_ray.actors.names import shard_name
from lmkv_ray.actors.operations import Operations
from lmkv_ray.actors.parts import Directory
from lmkv_ray.actors.peers import RayPeers
from lmkv_ray.actors.replication import PERIOD_SECONDS, Replication
from lmkv_ray.actors.sealing import Sealing
from lmkv_ray.actors.sources import Finder, GivenFinder, PeerFinder, TierFinder
from lmkv_ray.actors.staging import Staging
from lmkv_ray.actors.telling import Telling
from lmkv_ray.actors.tiers import open_tiers
from lmkv_ray.actors.wire import (
    Drain,
    EngineStatus,
    Move,
    PeerAddress,
    ShardStatus,
    Take,
    Taken,
)
from lmkv_ray.arena.names import arena_name
from lmkv_ray.config import Settings, settings_here
from lmkv_ray.errors import ArenaError, LmkvError
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import (
    Clears,
    Hello,
    Stage,
    Welcome,
    decode,
    decode_exchange,
    encode,
)
from lmkv_ray.transports import (
    Batch,
    ChunkReader,
    Helper,
    NixlSource,
    Transports,
    all_transports,
    host_id,
)

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
OPEN_SECONDS = 1.0, 10.0
"""First and longest pause before a shard without arena tries again to have one."""


def start_shard(settings: Settings, node_id: str) -> Handle:
    """The shard of a node, started if there is none. Blocks."""
    name, namespace = shard_name(node_id), settings.ray_namespace
    return start(ShardActor, name, namespace, (settings, node_id), node_id)


class ShardActor:
    """Owner of a node's arena. Arguments and answers are msgpack bytes of ``messages``.

    While it cannot have an arena it tries again, and answers every call with the typed reason.

    Args:
        settings: of the cache; what is a node's in them, this node's own environment may set.
        node_id: the Ray node it is pinned to.
    """

    async def __init__(self, settings: Settings, node_id: str) -> None:  # type: ignore[misc]
        log.show()
        self._settings = settings
        self._node_id = node_id
        self._directory = Directory(settings.ray_namespace, settings.directory_shards)
        self._peers = RayPeers(settings.ray_namespace, node_id, self._directory)
        self._failure: LmkvError | None = None
        self._taken = ""
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._tasks: list[asyncio.Task[None]] = []
        if not await self._open(restarted):
            self._opening = asyncio.create_task(until(OPEN_SECONDS, self._open))

    async def _open(self, restarted: bool = True) -> bool:
        """Have an arena and all that stands on it; whether that worked, else it is tried again."""
        settings, node_id, writer = self._settings, self._node_id, None
        try:
            settings, others = settings_here(settings)
            if others and self._failure is None:  # once
                logger.warning(
                    "lmkv_ray: this node sets %s; the cache keeps the values it was started with",
                    ", ".join(f"LMKV_{name.upper()}" for name in others),
                )
            name = arena_name(settings.ray_namespace, node_id)
            memory, store = await asyncio.to_thread(memory_of_node, node_id)
            writer = await asyncio.to_thread(
                open_arena,
                settings,
                name,
                restarted=restarted,
                ray=memory,
                object_store=store,
                say=self._took,
            )
            self._shard = Shard(writer, settings, node_id)
            self._tiers, self._refused = await open_tiers(settings)
            known = all_transports(writer, Helper(writer))
            self._fetching = PeerFinder(self._peers, Transports(known, settings.transport))
            instant = [t for t in self._tiers if t.capabilities.instant]
            distant = [t for t in self._tiers if not t.capabilities.instant]
            finders: list[Finder] = [
                *(TierFinder(tier, self._caught_up) for tier in instant),
                self._fetching,
                *(TierFinder(tier, self._caught_up) for tier in distant),
            ]
            self._staging = Staging(self._shard, finders)
            self._demotion = Demotion(self._shard, self._tiers)
            self._chunks = ChunkReader(self._shard.reader)
            self._nixl = NixlSource(self._shard.reader, Helper(writer), writer.set_checksum)
        except LmkvError as error:
            if str(error) != str(self._failure):
                logger.error("lmkv_ray: no arena on node %s: %s", node_id, error)
            self._failure = error
            if writer is not None:
                writer.close()
            return False
        self._clearing = Clearing(self._shard, self._tiers, self._peers)
        await self._clearing.start()
        self._sealing = Sealing(self._shard)
        self._telling = Telling(
            self._shard, self._directory, self._clearing.catch_up, self._sealing.batch
        )
        self._handover = Handover(self._shard, node_id, self._peers, self._directory)
        self._replication = Replication(self._shard, self._handover, settings.replicas)
        self._operations = Operations(
            self._shard, node_id, self._tiers, self._demotion, self._peers
        )
        self._tasks = [
            *self._telling.start(),
            asyncio.create_task(forever("ticking", TICK_SECONDS, self._tick)),
            asyncio.create_task(forever("writing to tiers", TICK_SECONDS, self._demotion.step)),
            asyncio.create_task(forever("noting checksums", TICK_SECONDS, self._sealing.step)),
            asyncio.create_task(forever("hearing of clears", TICK_SECONDS, self._hear)),
            asyncio.create_task(forever("replicating", PERIOD_SECONDS, self._replication.step)),
        ]
        self._failure = None
        return True

    async def hello(self, message: bytes) -> bytes:
        """``Hello`` -> ``Welcome``.

        Raises:
            ArenaError: there is no arena, the chunks do not fit, or the engine is out of sight.
        """
        grant = self._working.hello(decode(message, Hello))
        return encode(
            Welcome(
                arena_path=self._shard.writer.path,
                arena_id=self._shard.writer.arena_id,
                node_id=self._node_id,
                grant=grant,
                peers=self._elsewhere,
                clock=time.monotonic(),
            )
        )

    async def exchange(self, message: bytes) -> bytes:
        """``Exchange`` -> ``ExchangeReply``."""
        exchange = decode_exchange(message)
        reply = self._working.exchange(exchange)
        self._replication.touched(exchange.touched)
        return encode(msgspec.structs.replace(reply, peers=self._elsewhere))

    async def stage(self, message: bytes) -> bytes:
        """``Stage`` -> ``StageReply``, when all has come, nothing more can, or at the deadline."""
        _ = self._working
        return encode(await self._staging.stage(decode(message, Stage)))

    async def address(self, host: str = "") -> bytes:
        """``PeerAddress``: how other shards read from this one; also says that it works.

        Args:
            host: the ``host_id`` of a shard that is going to read.

        Raises:
            ArenaError: there is no arena.
        """
        writer = self._working.writer
        if host not in ("", host_id()):
            self._nixl.start()
        return encode(
            PeerAddress(
                node_id=self._node_id,
                host=host_id(),
                arena_path=writer.path,
                arena_id=writer.arena_id,
                nixl_obstacle=self._nixl.obstacle,
            )
        )

    async def locate(self, keys: bytes, known: str) -> bytes:
        """Where chunks are, for another shard (see ``NixlTransport``)."""
        _ = self._working
        self._sealing.wanted = True
        return await self._nixl.locate(keys, known)

    async def read(self, keys: bytes) -> Batch:
        """Chunks for another shard (see ``ObjectStoreTransport``)."""
        _ = self._working
        self._sealing.wanted = True
        return await asyncio.to_thread(self._chunks.read, key_array(keys))

    async def take(self, message: bytes) -> bytes:
        """``Take`` -> ``Taken``: fetch chunks from a node that asks for it."""
        take = decode(message, Take)
        writer = self._working.writer
        if self._telling.draining:  # the directory did not know yet
            return encode(Taken(keys=b""))
        size = writer.geometry.slot_size(take.slot_bytes)
        keys = key_list(key_array(take.keys))
        finder = GivenFinder(self._fetching, take.node_id)
        taken = await self._staging.take(take.space, size, keys, take.within, finder)
        if take.pinned:
            self._shard.pin(taken, True)
        return encode(Taken(keys=b"".join(taken)))

    async def drain(self, message: bytes) -> bytes:
        """``Drain`` -> ``Drained``: the node leaves; hand over what only it holds.

        It goes on serving until it ends, and takes nothing from others any more.
        """
        drain = decode(message, Drain)
        _ = self._working
        self._telling.draining = True
        return encode(await self._handover.drain(drain.within))

    async def where(self, keys: bytes) -> bytes:
        """Which of these chunks the tiers of this node hold: a list of ``Holding``."""
        _ = self._working
        return msgspec.msgpack.encode(await self._operations.where(keys))

    async def pin(self, keys: bytes, pinned: bool) -> bytes:
        """Pin chunks of this node, or let them go; the keys of those that are pinned now."""
        _ = self._working
        return b"".join(await self._operations.pin(keys, pinned))

    async def evict(self, keys: bytes) -> bytes:
        """Remove chunks from this node's memory; the keys of those that were there."""
        _ = self._working
        return b"".join(self._operations.evict(keys))

    async def move(self, message: bytes) -> bytes:
        """``Move``: the keys of those that are there now."""
        move = decode(message, Move)
        _ = self._working
        return b"".join(await self._operations.move(move))

    async def clear(self, space: bytes = b"") -> bytes:
        """Remove the chunks of a space (8 bytes, little endian; none: all) from all nodes.

        Raises:
            ArenaError: the directory did not take it on; only this node is cleared.
        """
        _ = self._working
        await self._clearing.clear(space)
        if await self._directory.clear(space) is None:
            raise ArenaError(
                "Only this node was cleared: the directory does not answer.",
                next_step="clear again in a few seconds.",
            )
        return b""

    async def catch_up(self, message: bytes) -> bytes:
        """``Clears`` -> ``Cleared``: carry out what was missed."""
        _ = self._working
        return encode(await self._clearing.catch_up(decode(message, Clears).clears))

    async def status(self) -> bytes:
        """``ShardStatus``."""
        me = ShardStatus(node_id=self._node_id, pid=os.getpid())
        if self._failure is not None:
            return encode(msgspec.structs.replace(me, problem=str(self._failure)))
        state = self._shard.state
        return encode(
            msgspec.structs.replace(
                me,
                capacity=self._shard.capacity,
                chunks=len(state.chunks),
                nbytes=state.chunks.nbytes,
                engines=[
                    EngineStatus(engine_id=name, model=model, slots=slots, device_chunks=held)
                    for name, (model, slots, held) in state.engines().items()
                ],
                kin=state.kin(),
                counters=self._shard.counters() | asdict(self._staging.counters),
                tiers=[*(tier.status() for tier in self._tiers), *self._refused],
                draining=self._telling.draining,
                taken=self._taken,
                refusals=self._shard.refusals.reasons(time.monotonic()),
            )
        )

    def _took(self, why: str) -> None:
        self._taken = why
        logger.info("lmkv_ray: the shard of node %s %s", self._node_id, why)

    @property
    def _working(self) -> Shard:
        if self._failure is not None:
            raise self._failure
        return self._shard

    @property
    def _elsewhere(self) -> int:
        """Places outside the arena that hold chunks, or may."""
        tiers = self._tiers if self._caught_up() else []
        return self._directory.others + sum(tier.status().chunks != 0 for tier in tiers)

    def _caught_up(self) -> bool:
        return self._telling.caught_up

    async def _hear(self) -> None:
        if self._caught_up():
            await self._clearing.hear(self._directory.clear)

    async def _tick(self) -> None:
        self._shard.tick()
        self._clearing.settle()
