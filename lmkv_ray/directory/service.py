"""One part of the directory: its state behind methods that take and give bytes, and its calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from lmkv_ray.clock import Clock
from lmkv_ray.config import Settings
from lmkv_ray.directory.clears import KeptClears
from lmkv_ray.directory.holdings import Holding, merge
from lmkv_ray.directory.parts import positions_by_part
from lmkv_ray.directory.state import DirectoryState
from lmkv_ray.errors import ArenaError, ConfigError
from lmkv_ray.keys import key_array
from lmkv_ray.messages import ClearDone, Clears, Delta, ShardCleared, decode, encode
from lmkv_ray.neighbours import ClusterMemory, Neighbours
from lmkv_ray.orders import Drain, Drained
from lmkv_ray.status import CacheStatus, DirectoryStatus, ShardStatus
from lmkv_ray.story import lines_of

logger = logging.getLogger(__name__)

SPACE_BYTES = 8
ATTEMPTS = 8
"""To give a clear a number that is news to every shard."""
AHEAD_SECONDS = 86400.0
"""That the clock of another cluster may be ahead of ours."""
STEP_BYTES = 3
"""Of a random step between two clears of one time: up to 17 ms."""
ANSWER_SECONDS = 2.0
"""How long another service may take to answer the directory."""


class DirectoryService:
    """Holds no truth: it may end at any time, and is rebuilt from the shards' snapshots.

    Every part knows its share of the keys. Part 0 also orders clears.

    Args:
        settings: those of the cache.
        part: which one this is.
        clock: the machine's.
        neighbours: the way to the shards and the other parts.
        memory: keeps the log of clears; of part 0 only.
    """

    def __init__(
        self,
        settings: Settings,
        part: int,
        clock: Clock,
        neighbours: Neighbours,
        memory: ClusterMemory,
    ) -> None:
        self.state = DirectoryState(
            -(-settings.directory_capacity // settings.directory_parts),
            orders_clears=part == 0,
            step=lambda: 1 + int.from_bytes(clock.random_bytes(STEP_BYTES), "little"),
        )
        self.shards: set[str] = set()
        """Nodes that have a shard, as the cluster's keeper says."""
        self._capacity = -(-settings.directory_capacity // settings.directory_parts)
        self._parts = settings.directory_parts
        self._part = part
        self._clock = clock
        self._neighbours = neighbours
        self._memory = memory
        self._kept: KeptClears | None = None
        """The log of clears as the memory has it."""
        self._keeping = asyncio.Lock()
        """Of two saves under way the older could land last."""

    async def remember(self) -> None:
        """Learn from the cluster's memory which clears there were. Call before any other method.

        Raises:
            OSError: the memory cannot be read now.
        """
        data = await self._memory.load() if self._part == 0 else None
        if data is None:
            return
        try:
            self._kept = decode(data, KeptClears)
        except msgspec.DecodeError:  # of another version: shards still know their last clear
            logger.exception("lmkv_ray: what the cluster keeps of clears is not understood")
            return
        self.state.clears.restore(self._kept)

    def delta(self, message: bytes) -> bytes:
        """``Delta`` -> ``DeltaReply``."""
        return encode(self.state.delta(decode(message, Delta), self._clock.monotonic()))

    def lookup(self, keys: bytes, node_id: str, cleared: int) -> bytes:
        """Which other nodes hold which of a run of keys: a list of ``Holding``."""
        now = self._clock.monotonic()
        return msgspec.msgpack.encode(self.state.lookup(key_array(keys), node_id, cleared, now))

    async def where(self, keys: bytes) -> bytes:
        """The same of all nodes and of engines' devices, from all parts that answer."""
        rows = key_array(keys)
        asked = positions_by_part(rows, self._parts)
        answers = await asyncio.gather(
            *(
                self._ask_part(part, "part_where", rows[positions].tobytes())
                for part, positions in asked.items()
            )
        )
        found = [
            (positions.tolist(), msgspec.msgpack.decode(answer, type=list[Holding]))
            for positions, answer in zip(asked.values(), answers, strict=True)
            if answer is not None
        ]
        return msgspec.msgpack.encode(merge(found))

    def part_where(self, keys: bytes) -> bytes:
        """What this part knows of ``where``."""
        return msgspec.msgpack.encode(self.state.where(key_array(keys), self._clock.monotonic()))

    def rooms(self, node_id: str) -> bytes:
        """Bytes of other nodes' chunks that each node but this one would take."""
        return msgspec.msgpack.encode(self.state.rooms(node_id, self._clock.monotonic()))

    async def clear(self, space: bytes, number: int = 0, old: bool = False) -> bytes:
        """Clear a space (8 bytes; none: all) on all nodes: ``ClearDone``.

        A ``number`` is that of a clear which a node found in a store that several share: it is
        ordered here once, under this number if that is a new one. So caches that share a store
        do not answer each other's clears for ever. A program that may write the store could name
        any
        number: one far ahead of this clock is replaced, for there must be higher ones.

        An ``old`` one was in the store before the node began to look.

        Returns when every shard that answers serves nothing of it any more. The others do when they
        speak again; no reader is sent to them before.

        Raises:
            ConfigError: the space has neither 0 nor 8 bytes.
            ArenaError: the cluster's memory did not take it on, so it may be forgotten; or a shard
                says again and again that it has carried out a later one.
        """
        if len(space) not in (0, SPACE_BYTES):  # every node and tier would try it for ever
            raise ConfigError(
                f"A space has {SPACE_BYTES} bytes, not {len(space)}.",
                next_step="use lmkv clear, or Cache.clear(namespace, salt).",
            )
        clears = self.state.clears
        if number and clears.knows(number, old=old):
            return encode(ClearDone(number=number))
        if number > (self._clock.wall() + AHEAD_SECONDS) * 1e9:
            number = 0
        for _ in range(ATTEMPTS):
            clear = clears.new(space, number or int(self._clock.wall() * 1e9))
            await self._keep()
            # All that a node owes: it may have missed others, which a higher number would hide.
            owed = {n: (encode(Clears(clears=self.state.owed(n))),) for n in self.shards}
            answers = await self._ask_shards("catch_up", owed)
            cleared = [decode(a, ShardCleared) for a in answers.values() if a is not None]
            for answer in cleared:
                clears.heard(answer.previous)
            # A clock that was turned back: to those shards it was no news.
            if all(answer.previous <= clear.number for answer in cleared):
                await self._keep()
                pending = sorted({name for answer in cleared for name in answer.pending})
                return encode(ClearDone(number=clear.number, pending=pending))
        raise ArenaError(
            f"The clear is not known to all nodes: one says each time that it has carried out a "
            f"later one than number {clear.number}.",
            next_step="'lmkv status' names the nodes; restart their shards, and clear again.",
        )

    async def _keep(self) -> None:
        """Have the log of clears in the cluster's memory, before a clear is answered.

        Raises:
            ArenaError: the memory cannot be written now.
        """
        async with self._keeping:
            log = self.state.clears.kept()
            if log == self._kept:
                return
            try:
                await self._memory.save(encode(log))
            except OSError as error:
                raise ArenaError(
                    f"The clear may be forgotten: the cluster's memory does not keep it ({error}).",
                    next_step="clear again in a few seconds.",
                ) from error
            self._kept = log

    async def drain(self, node_id: str, within: float) -> None:
        """Let the shard of a node hand over its chunks; afterwards the node counts as gone."""
        shard = self._neighbours.shard(node_id)
        message = encode(Drain(within=within))
        answer = await shard.ask("drain", message, within=within + ANSWER_SECONDS)
        if answer is not None:
            done = decode(answer, Drained)
            logger.info(
                "lmkv_ray: node %s has handed over %d chunks, %d are lost with it",
                node_id,
                done.copied,
                done.left,
            )
        self.lose(node_id)

    def lose(self, node_id: str) -> None:
        """A node is gone."""
        self.state.node_lost(node_id)
        self.shards.discard(node_id)
        self._neighbours.forget(node_id)

    async def status(self) -> bytes:
        """``CacheStatus``."""
        shards, parts = await asyncio.gather(
            self._ask_shards("status"),
            asyncio.gather(*(self._ask_part(part, "part_status") for part in range(self._parts))),
        )
        return encode(
            CacheStatus(
                nodes=[decode(a, ShardStatus) for a in shards.values() if a is not None],
                silent=[node_id for node_id, a in shards.items() if a is None],
                directory=[decode(a, DirectoryStatus) for a in parts if a is not None],
            )
        )

    def part_status(self) -> bytes:
        """``DirectoryStatus``."""
        return encode(self.describe())

    def story(self) -> bytes:
        """The last events of this part, a list of lines."""
        return msgspec.msgpack.encode(lines_of(self.state.story, self._clock.monotonic()))

    def describe(self) -> DirectoryStatus:
        """What this part knows at present."""
        nodes = self.state.nodes(self._clock.monotonic())
        return DirectoryStatus(
            part=self._part,
            nodes=len(nodes),
            unsynced=sum(not node.synced for node in nodes),
            chunks=len(self.state.table),
            capacity=self._capacity,
        )

    def known(self) -> set[str]:
        """Nodes that have spoken, or that have a shard."""
        nodes = self.state.nodes(self._clock.monotonic())
        return {node.node_id for node in nodes} | self.shards

    def idle(self, seconds: float) -> set[str]:
        """Nodes to which no engine was attached for longer than so many seconds."""
        nodes = self.state.nodes(self._clock.monotonic())
        return {node.node_id for node in nodes if node.idle > seconds}

    async def _ask_part(self, part: int, method: str, *arguments: object) -> bytes | None:
        if part == self._part:
            answer: bytes = getattr(self, method)(*arguments)
            return answer
        return await self._neighbours.part(part).ask(method, *arguments, within=ANSWER_SECONDS)

    async def _ask_shards(
        self, method: str, arguments: Mapping[str, tuple[object, ...]] = MappingProxyType({})
    ) -> dict[str, bytes | None]:
        """Call a method of all shards, with arguments by node."""
        nodes = sorted(self.shards)
        answers = await asyncio.gather(
            *(
                self._neighbours.shard(node_id).ask(
                    method, *arguments.get(node_id, ()), within=ANSWER_SECONDS
                )
                for node_id in nodes
            )
        )
        return dict(zip(nodes, answers, strict=True))
