"""One node of a cache: everything that its shard does, behind methods that take and give bytes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import asdict

import msgspec

from lmkv_ray.arena import ArenaWriter
from lmkv_ray.config import Settings
from lmkv_ray.errors import ArenaError
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import Clears, Hello, Stage, Welcome, decode, decode_exchange, encode
from lmkv_ray.neighbours import Neighbours
from lmkv_ray.node.clears import NodeClears
from lmkv_ray.node.demotion import Demotion
from lmkv_ray.node.directory import DirectoryClient
from lmkv_ray.node.handover import Handover
from lmkv_ray.node.loops import Alarm, every, whenever
from lmkv_ray.node.machine import Machine
from lmkv_ray.node.operations import Operations
from lmkv_ray.node.peers import Peers
from lmkv_ray.node.replication import PERIOD_SECONDS, Replication
from lmkv_ray.node.reports import Reports
from lmkv_ray.node.shard import Shard
from lmkv_ray.node.sources import Finder, GivenFinder, PeerFinder, TierFinder
from lmkv_ray.node.staging import Staging
from lmkv_ray.orders import Drain, Move, PeerAddress, Take, Taken
from lmkv_ray.status import EngineStatus, ShardStatus, TierStatus
from lmkv_ray.story import lines_of
from lmkv_ray.tiers import Tier
from lmkv_ray.transports import Answer, Servers, Transports

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""Between two looks at the engines' processes."""
BATCH_SECONDS = 0.1
"""Between two steps of a loop that has work."""
LATE_SECONDS = 1.0
"""After this a loop looks for work though nothing has rung."""


class Node:
    """A node that works. Made by ``open``.

    Arguments and answers of its methods are msgpack bytes of ``messages``, ``orders`` and
    ``status``, as they travel.
    """

    def __init__(
        self,
        settings: Settings,
        node_id: str,
        machine: Machine,
        neighbours: Neighbours,
        writer: ArenaWriter,
        tiers: tuple[list[Tier], list[TierStatus]],
        taken: str,
    ) -> None:
        """See ``open``, which also starts the loops.

        Args:
            settings: those of this node.
            node_id: the id of this node.
            machine: what the node runs on.
            neighbours: the way to the directory and the other nodes.
            writer: the arena.
            tiers: the tiers, the quickest first, and the state of those that were refused.
            taken: what memory the arena took, and why.
        """
        self._settings = settings
        self._node_id = node_id
        self._machine = machine
        self._taken = taken
        self._tiers, self._refused = tiers
        clock = machine.clock
        self._directory = DirectoryClient(neighbours, settings.directory_parts, clock)
        self._peers = Peers(neighbours, self._directory, node_id, machine.host, clock)
        self.shard = shard = Shard(writer, settings, node_id, machine)
        transports = Transports(machine.transports(writer), settings.transport, clock)
        self._peer_finder = PeerFinder(self._peers, transports, clock)
        self._staging = Staging(shard, self._finders())
        self._demotion = Demotion(shard, self._tiers)
        self._servers = Servers(machine.servers(shard.reader, writer))
        self._clears = NodeClears(shard, self._tiers, self._peers)
        self._reports = Reports(shard, self._directory, self._clears.catch_up)
        self._handover = Handover(shard, node_id, self._peers, self._directory)
        self._replication = Replication(shard, self._handover, settings.replicas)
        self._operations = Operations(shard, node_id, self._tiers, self._demotion, self._peers)
        self._loops: list[asyncio.Task[None]] = []
        self._admitted = Alarm()
        """Rings when a chunk has earned a tier."""
        shard.changed = self._changed

    @classmethod
    async def open(
        cls, settings: Settings, node_id: str, machine: Machine, neighbours: Neighbours
    ) -> Node:
        """A whole node, whose loops run.

        Args:
            settings: those of this node.
            node_id: the id of this node.
            machine: what the node runs on.
            neighbours: the way to the directory and the other nodes.

        Raises:
            LmkvError: the node has no arena, or its settings cannot be kept. Nothing is left open.
        """
        taken: list[str] = []
        writer = await machine.open_arena(settings, taken.append)
        tiers: tuple[list[Tier], list[TierStatus]] = ([], [])
        try:
            tiers = await machine.open_tiers(settings)
            node = cls(settings, node_id, machine, neighbours, writer, tiers, "; ".join(taken))
            await node._clears.start()
        except BaseException:
            for tier in tiers[0]:
                await tier.close()
            writer.close()
            raise
        logger.info("lmkv_ray: the shard of node %s %s", node_id, "; ".join(taken))
        node._start()
        return node

    def _start(self) -> None:
        clock = self._machine.clock
        loops = [every(TICK_SECONDS, "ticking", self._tick, clock)]
        if self._tiers:
            step, seconds = self._demotion.step, (BATCH_SECONDS, LATE_SECONDS)
            loops.append(whenever(self._admitted, "writing to tiers", step, clock, seconds))
        if any(tier.capabilities.shared for tier in self._tiers):
            loops.append(every(LATE_SECONDS, "hearing of clears", self._hear, clock))
        if self._settings.replicas > 1:
            loops.append(every(PERIOD_SECONDS, "replicating", self._replication.step, clock))
        self._loops = [*self._reports.start(), *map(asyncio.create_task, loops)]

    def _changed(self) -> None:
        """Wake the loops that may have work now."""
        self._reports.changed()
        if self._tiers and len(self.shard.state.chunks.admission):
            self._admitted.ring()

    async def close(self) -> None:
        """End all loops and let go of tiers and arena; engines may still map the memory."""
        for loop in self._loops:
            loop.cancel()
        for loop in self._loops:
            with contextlib.suppress(asyncio.CancelledError):
                await loop
        for tier in self._tiers:
            await tier.close()
        self.shard.close()

    # -- engines ---------------------------------------------------------------------------------

    def hello(self, message: bytes) -> bytes:
        """``Hello`` -> ``Welcome``.

        Raises:
            ArenaError: the chunks do not fit, or the engine is out of sight.
        """
        grant = self.shard.hello(decode(message, Hello))
        return encode(
            Welcome(
                arena_path=self.shard.writer.path,
                arena_id=self.shard.writer.arena_id,
                node_id=self._node_id,
                grant=grant,
                peers=self._elsewhere,
                clock=self._machine.clock.monotonic(),
            )
        )

    def exchange(self, message: bytes) -> bytes:
        """``Exchange`` -> ``ExchangeReply``."""
        exchange = decode_exchange(message)
        reply = self.shard.exchange(exchange)
        self._replication.touched(exchange.touched)
        return encode(msgspec.structs.replace(reply, peers=self._elsewhere))

    async def stage(self, message: bytes) -> bytes:
        """``Stage`` -> ``StageReply``, when all has come, nothing more can, or at the deadline."""
        return encode(await self._staging.stage(decode(message, Stage)))

    # -- other nodes -----------------------------------------------------------------------------

    def address(self, host: str = "") -> bytes:
        """``PeerAddress``: how other nodes read from this one.

        Args:
            host: the ``host_id`` of a shard that is going to read; empty: of none.
        """
        return encode(
            PeerAddress(
                node_id=self._node_id,
                host=self._machine.host,
                arena_id=self.shard.writer.arena_id,
                offers=self._servers.offers(host),
            )
        )

    async def serve(self, transport: str, question: bytes) -> Answer:
        """Answer a question of another node, which fetches chunks from here.

        Args:
            transport: the name of the transport by which it fetches.
            question: what the other end of the transport asks.
        """
        return await self._servers.answer(transport, question)

    async def take(self, message: bytes) -> bytes:
        """``Take`` -> ``Taken``: fetch chunks from a node that asks for it."""
        take = decode(message, Take)
        # The directory did not know yet that this node leaves; or the sender has missed a clear.
        if self._reports.draining or take.cleared < self.shard.cleared:
            return encode(Taken(keys=b""))
        size = self.shard.writer.geometry.slot_size(take.slot_bytes)
        keys = key_list(key_array(take.keys))
        finder = GivenFinder(self._peer_finder, take.node_id)
        taken = await self._staging.take(take.space, size, keys, take.within, finder)
        if take.pinned:
            self.shard.pin(taken, True)
        return encode(Taken(keys=b"".join(taken)))

    # -- the directory and people ----------------------------------------------------------------

    async def drain(self, message: bytes) -> bytes:
        """``Drain`` -> ``Drained``: the node leaves; hand over what only it holds.

        It goes on serving until it ends, and takes nothing from others any more.
        """
        drain = decode(message, Drain)
        self._reports.draining = True
        self._reports.changed()
        return encode(await self._handover.drain(drain.within))

    async def where(self, keys: bytes) -> bytes:
        """Which of these chunks the tiers of this node hold: a list of ``Holding``."""
        return msgspec.msgpack.encode(await self._operations.where(keys))

    async def pin(self, keys: bytes, pinned: bool) -> bytes:
        """Pin chunks of this node, or let them go; the keys of those that are pinned now."""
        return b"".join(await self._operations.pin(keys, pinned))

    def evict(self, keys: bytes) -> bytes:
        """Remove chunks from this node's memory; the keys of those that were there."""
        return b"".join(self._operations.evict(keys))

    async def move(self, message: bytes) -> bytes:
        """``Move``: the keys of those that are there now."""
        return b"".join(await self._operations.move(decode(message, Move)))

    async def clear(self, space: bytes = b"") -> bytes:
        """Remove the chunks of a space (8 bytes, little endian; none: all) from all nodes.

        Raises:
            ArenaError: the directory did not take it on; only this node is cleared.
        """
        await self._clears.clear(space)
        if await self._directory.clear(space) is None:
            raise ArenaError(
                "Only this node was cleared: the directory does not answer.",
                next_step="clear again in a few seconds.",
            )
        return b""

    async def catch_up(self, message: bytes) -> bytes:
        """``Clears`` -> ``ShardCleared``: carry out what was missed."""
        return encode(await self._clears.catch_up(decode(message, Clears).clears))

    def status(self) -> bytes:
        """``ShardStatus``."""
        return encode(self.describe())

    def story(self) -> bytes:
        """The shard's last events, a list of lines."""
        now = self._machine.clock.monotonic()
        return msgspec.msgpack.encode(lines_of(self.shard.state.story, now))

    def describe(self) -> ShardStatus:
        """What this node has and does at present."""
        shard, state = self.shard, self.shard.state
        return ShardStatus(
            node_id=self._node_id,
            pid=os.getpid(),
            capacity=shard.capacity,
            chunks=len(state.chunks),
            nbytes=state.chunks.nbytes,
            pinned=len(state.chunks.pinned()),
            engines=[
                EngineStatus(engine_id=name, model=model, slots=slots, device_chunks=held)
                for name, (model, slots, held) in state.engines().items()
            ],
            kin=state.kin(),
            counters=shard.counters() | asdict(self._staging.counters),
            tiers=[*(tier.status() for tier in self._tiers), *self._refused],
            draining=self._reports.draining,
            taken=self._taken,
            refusals=shard.refusals.reasons(self._machine.clock.monotonic()),
        )

    # -- within ----------------------------------------------------------------------------------

    def _finders(self) -> list[Finder]:
        """Tiers that answer at once, peers, tiers that have to be asked."""
        instant = [tier for tier in self._tiers if tier.capabilities.instant]
        distant = [tier for tier in self._tiers if not tier.capabilities.instant]
        return [
            *(TierFinder(tier, self._caught_up) for tier in instant),
            self._peer_finder,
            *(TierFinder(tier, self._caught_up) for tier in distant),
        ]

    @property
    def _elsewhere(self) -> int:
        """Nodes and tiers outside the arena that hold chunks, or may."""
        tiers = self._tiers if self._caught_up() else []
        return self._directory.others + sum(tier.status().chunks != 0 for tier in tiers)

    def _caught_up(self) -> bool:
        return self._reports.caught_up

    async def _hear(self) -> None:
        if self._caught_up():
            await self._clears.hear(self._directory.clear)

    async def _tick(self) -> None:
        self.shard.tick()
        self._clears.settle()
