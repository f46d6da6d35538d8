"""Nodes, the directory and engines of one run, and what can be done to them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from lmkv_ray.arena import ArenaReader
from lmkv_ray.config import Settings, load_settings
from lmkv_ray.directory.service import DirectoryService
from lmkv_ray.errors import LmkvError
from lmkv_ray.messages import ClearDone, decode
from lmkv_ray.node import Node
from lmkv_ray.tenants import space_of
from lmkv_ray.transports import PeerInfo
from tests.simulation.bucket import Bucket
from tests.simulation.content import Contents
from tests.simulation.engine import SimulatedEngine, Writes
from tests.simulation.loop import Incarnation, VirtualLoop
from tests.simulation.machine import SimulatedMachine
from tests.simulation.network import Network, SimulatedNeighbours
from tests.simulation.story import Story
from tests.simulation.transport import SimulatedTransport, Wire

CAPACITY = 4 << 20
SPACES = [space_of(name) for name in (b"one.", b"two.")]
KEEPER_SECONDS = 1.0
DIRECTORY_MACHINE = "head"


class SimulatedMemory:
    """See ``lmkv_ray.neighbours.ClusterMemory``."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._data: bytes | None = None

    async def load(self) -> bytes | None:
        await asyncio.sleep(self._random.uniform(0, 0.01))
        return self._data

    async def save(self, data: bytes) -> None:
        await asyncio.sleep(self._random.uniform(0, 0.01))
        self._data = data
        await asyncio.sleep(self._random.uniform(0, 0.01))


@dataclass
class _Shard:
    machine: SimulatedMachine
    incarnation: Incarnation
    node: Node | None = None


@dataclass
class _Part:
    incarnation: Incarnation
    service: DirectoryService


@dataclass
class Cluster:
    """Everything of one run.

    Args:
        loop: has the virtual time.
        random: the only source of chance.
        story: what happens is told there.
        nodes: how many machines have a shard.
        parts: of the directory.
        disks: whether the machines have a disk tier.
        bucket_wanted: whether they share an object store.
    """

    loop: VirtualLoop
    random: Random
    story: Story
    nodes: int
    parts: int
    disks: bool
    bucket_wanted: bool
    contents: Contents = field(default_factory=Contents)
    shards: dict[str, _Shard] = field(default_factory=dict)
    directory: dict[int, _Part] = field(default_factory=dict)
    engines: dict[str, SimulatedEngine] = field(default_factory=dict)
    asleep: list[Incarnation] = field(default_factory=list)
    """Processes that are frozen now."""

    def __post_init__(self) -> None:
        self.settings: Settings = load_settings(
            {
                "capacity": CAPACITY,
                "directory_parts": self.parts,
                "directory_capacity": 4096,
                "grant_seconds": 10.0,
                "replicas": self.random.choice([1, 1, 2]),
                "tier_admission": self.random.choice(["all", "second_hit"]),
                "eviction_policy": self.random.choice(["arc", "lru", "s3fifo", "hinted"]),
                **({"disk_dir": "/simulated"} if self.disks else {}),
                **({"remote_url": "file:///simulated"} if self.bucket_wanted else {}),
            }
        )
        self.network = Network(self.loop, self.random, self.story)
        self.machines = {
            f"n{i}": SimulatedMachine(f"n{i}", self.loop, self.random, disk=self.disks)
            for i in range(self.nodes)
        }
        if self.random.random() < 0.5:
            wire = Wire(self.network.travel, self._memory, lambda: self.network.damage)
            for machine in self.machines.values():
                machine.card = SimulatedTransport(machine.name, wire, machine.clock, self.random)
        self.bucket = Bucket(self.random) if self.bucket_wanted else None
        for machine in self.machines.values():
            machine.bucket = self.bucket
        self.head = SimulatedMachine(DIRECTORY_MACHINE, self.loop, self.random, disk=False)
        self.writes = {name: Writes() for name in self.machines}
        self.memory = SimulatedMemory(self.random)
        self._engine_number = 0

    async def start(self) -> None:
        """Start every service and an engine or two on each node."""
        for part in range(self.parts):
            self.start_part(part)
        for name in self.machines:
            self.start_shard(name)
            for _ in range(self.random.randint(1, 2)):
                self.start_engine(name)
        self.loop.start(self._keep())

    # -- services --------------------------------------------------------------------------------

    def start_part(self, part: int) -> None:
        incarnation = Incarnation(f"directory {part}")
        neighbours = SimulatedNeighbours(self.network, DIRECTORY_MACHINE)
        service = DirectoryService(self.settings, part, self.head.clock, neighbours, self.memory)
        self.directory[part] = _Part(incarnation, service)
        incarnation.run(self._begin_part, part, service)
        self.story.tell(f"directory {part} starts")
        self._reconcile()

    def _begin_part(self, part: int, service: DirectoryService) -> None:
        self.loop.start(self._remember(part, service))

    async def _remember(self, part: int, service: DirectoryService) -> None:
        await service.remember()
        incarnation = self.directory[part].incarnation
        self.network.serve(f"directory {part}", DIRECTORY_MACHINE, incarnation, service)

    def kill_part(self, part: int) -> None:
        """Ray starts it again some time later."""
        self.story.tell(f"directory {part} is killed")
        gone = self.directory.pop(part, None)
        if gone is None:
            return
        self._forget(gone.incarnation)
        self.network.ended(f"directory {part}")
        self.loop.call_later(self.random.uniform(0.5, 5), self._again_part, part)

    def _again_part(self, part: int) -> None:
        if part not in self.directory:
            self.start_part(part)

    def start_shard(self, name: str) -> None:
        machine = self.machines[name]
        incarnation = Incarnation(f"shard {name}")
        machine.process = machine.spawn()
        shard = self.shards[name] = _Shard(machine, incarnation)
        incarnation.run(self._begin_shard, shard)

    def _begin_shard(self, shard: _Shard) -> None:
        self.loop.start(self._open(shard))

    async def _open(self, shard: _Shard) -> None:
        name = shard.machine.name
        neighbours = SimulatedNeighbours(self.network, name)
        while True:
            try:
                node = await Node.open(self.settings, name, shard.machine, neighbours)
            except LmkvError as error:
                self.story.tell(f"shard {name} has no arena: {error}")
                await asyncio.sleep(1)
                continue
            shard.node = node
            self.network.serve(f"shard {name}", name, shard.incarnation, node)
            writer = node.shard.writer
            self.story.tell(
                f"shard {name} starts, arena life {writer.epoch}, {len(node.shard.state.chunks)} "
                f"chunks, cleared {node.shard.cleared}"
            )
            return

    def kill_shard(self, name: str) -> None:
        """Ray starts it again some time later."""
        shard = self.shards.pop(name, None)
        if shard is None:
            return
        self.story.tell(f"shard {name} is killed")
        self._forget(shard.incarnation)
        self.network.ended(f"shard {name}")
        shard.machine.processes.discard(shard.machine.process)
        if shard.machine.writer is not None:
            shard.machine.writer.close()
            shard.machine.writer = None
        if shard.node is not None:
            shard.node.shard.reader.close()
        if shard.machine.disk is not None:
            shard.machine.disk.kill()
        self.loop.call_later(self.random.uniform(0.2, 5), self._again_shard, name)

    def _again_shard(self, name: str) -> None:
        if name not in self.shards:
            self.start_shard(name)

    def start_engine(self, name: str) -> None:
        """Start an engine on a node; one of four has workers on a second node too."""
        engine = self._new_engine(name, self.random.choice(SPACES))
        if self.random.random() < 0.25:
            other = self.random.choice([other for other in self.machines if other != name])
            engine.join(self._new_engine(other, engine.space))
        for part in filter(None, (engine, engine.far)):
            part.start()

    def _new_engine(self, name: str, space: int) -> SimulatedEngine:
        self._engine_number += 1
        engine = SimulatedEngine(
            f"e{self._engine_number}",
            self.machines[name],
            space,
            self.loop,
            self.network,
            self.contents,
            self.writes[name],
            Random(self.random.random()),
            self.story,
        )
        self.engines[engine.name] = engine
        self.story.tell(f"engine {engine.name} starts on {name}")
        return engine

    def kill_engine(self, engine: SimulatedEngine) -> None:
        """Its workers may outlive it for some time; then a new engine starts."""
        engine = engine.near or engine
        for part in filter(None, (engine, engine.far)):
            self._kill_engine(part)
        self.loop.call_later(self.random.uniform(0, 5), self.start_engine, engine.machine.name)

    def _kill_engine(self, engine: SimulatedEngine) -> None:
        if self.engines.pop(engine.name, None) is None:
            return
        self.story.tell(f"engine {engine.name} is killed")
        self._forget(engine.incarnation)
        engine.end()
        if self.random.random() < 0.5:
            engine.worker.frozen = True  # it was in the middle of something
            self.asleep.append(engine.worker)
            wakes = self.random.uniform(0, 10)
            self.loop.call_later(wakes, self.thaw, engine.worker)
            self.loop.call_later(wakes + self.random.uniform(0, 3), self._end_worker, engine)
        else:
            self._end_worker(engine)

    def _end_worker(self, engine: SimulatedEngine) -> None:
        self.story.tell(f"worker of {engine.name} has ended")
        self._forget(engine.worker)
        engine.end_worker()

    def freeze(self, incarnation: Incarnation, seconds: float) -> None:
        """Stop a process for so long."""
        if incarnation.alive and not incarnation.frozen:
            self.story.tell(f"{incarnation.name} is frozen for {seconds:.1f} s")
            incarnation.frozen = True
            self.asleep.append(incarnation)
            self.loop.call_later(seconds, self.thaw, incarnation)

    def thaw(self, incarnation: Incarnation) -> None:
        if incarnation in self.asleep:
            self.asleep.remove(incarnation)
            self.loop.thaw(incarnation)
            self.story.tell(f"{incarnation.name} goes on")

    def _forget(self, incarnation: Incarnation) -> None:
        incarnation.kill()
        if incarnation in self.asleep:
            self.asleep.remove(incarnation)

    async def _keep(self) -> None:
        """What Ray and the first part of the directory do: tell which nodes there are."""
        while True:
            self._reconcile()
            await asyncio.sleep(KEEPER_SECONDS)

    def _reconcile(self) -> None:
        for part in self.directory.values():
            part.service.shards |= self.machines.keys()

    def _memory(self, peer: PeerInfo) -> ArenaReader | None:
        """What a network card of another machine can read."""
        shard = self.shards.get(peer.node_id)
        return None if shard is None or shard.node is None else shard.node.shard.reader

    # -- people ------------------------------------------------------------------------------------

    async def clear(self, space: int | None) -> bool:
        """Clear a space for a person; whether it was answered."""
        asked = self.loop.time()
        which = b"" if space is None else space.to_bytes(8, "little")
        neighbour = SimulatedNeighbours(self.network, DIRECTORY_MACHINE).part(0)
        answer = await neighbour.ask("clear", which, within=10.0)
        if answer is None:
            self.story.tell("a clear was not answered")
            return False
        number = decode(answer, ClearDone).number
        self.contents.cleared(number, space, asked)
        self.story.tell(f"clear {number} of {space} is answered, asked at {asked:.3f}")
        return True

    async def operate(self, name: str, method: str, *arguments: object) -> None:
        """Call a method of a shard for a person, whatever comes of it."""
        neighbour = SimulatedNeighbours(self.network, DIRECTORY_MACHINE).shard(name)
        await neighbour.ask(method, *arguments, within=10.0)

    def some_keys(self, name: str, count: int) -> Sequence[bytes]:
        """Keys of chunks that a node holds."""
        shard = self.shards.get(name)
        if shard is None or shard.node is None:
            return []
        keys = list(shard.node.shard.state.chunks)
        return self.random.sample(keys, min(count, len(keys)))
