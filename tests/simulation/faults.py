"""What goes wrong in a run, and what people do meanwhile: drawn from the seed."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from lmkv_ray.messages import encode
from lmkv_ray.orders import Drain, Move
from tests.simulation.cluster import DIRECTORY_MACHINE, SPACES, Cluster


class Faults:
    """Acts of misfortune on a cluster; ``heal`` ends all that last."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._random = cluster.random
        # Each as often as it stands here.
        self._acts: list[Callable[[], object]] = [
            *3 * [self._kill_shard],
            *4 * [self._kill_engine],
            self._kill_machine,
            *3 * [self._lose_courier],
            *2 * [self._kill_part],
            *2 * [self._freeze_shard],
            self._freeze_engine,
            self._freeze_worker,
            self._freeze_part,
            *3 * [self._cut],
            self._lose,
            *2 * [self._slow],
            self._repeat,
            self._damage,
            self._turn_clock,
            *3 * [self._clear],
            *2 * [self._clear_and_kill],
            self._evict,
            self._pin,
            self._move,
            self._leave,
            self._break_disk,
            self._break_bucket,
            self._fill_memory,
        ]

    def strike(self) -> None:
        """Let one thing happen."""
        self._random.choice(self._acts)()

    def heal(self) -> None:
        """End everything that lasts. Processes that ended are started again by themselves."""
        cluster = self._cluster
        cluster.story.tell("all is healed")
        network = cluster.network
        network.cuts.clear()
        network.loss = network.repeats = network.damage = 0.0
        network.delay = 0.001
        for machine in cluster.machines.values():
            machine.full = False
            disk = machine.disk
            if disk is not None:
                disk.read_only = disk.broken = disk.gone = False
                disk.lies, disk.pace = 0.0, 0.001
                disk.unstick()
        bucket = cluster.bucket
        if bucket is not None:
            bucket.down = bucket.denied = False
            bucket.fails = bucket.hangs = bucket.lies = 0.0
            bucket.pace = 0.02
        for incarnation in [*cluster.asleep]:
            cluster.thaw(incarnation)

    def _later(self, seconds: float, what: Callable[[], object]) -> None:
        self._cluster.loop.call_later(seconds, what)

    def _machine(self) -> str:
        return self._random.choice([*self._cluster.machines])

    def _kill_shard(self) -> None:
        self._cluster.kill_shard(self._machine())

    def _kill_engine(self) -> None:
        if self._cluster.engines:
            name = self._random.choice([*self._cluster.engines])
            self._cluster.kill_engine(self._cluster.engines[name])

    def _lose_courier(self) -> None:
        """Engines of a node have to attach again while they work."""
        name = self._machine()
        for engine in self._cluster.engines.values():
            if engine.machine.name == name:
                engine.lose_courier()

    def _kill_machine(self) -> None:
        """The arena goes with it; of the disk only what was not synced."""
        name = self._machine()
        disk = self._cluster.machines[name].disk
        if disk is not None:
            disk.crash()
        self._cluster.kill_shard(name)
        for engine in [*self._cluster.engines.values()]:
            if engine.machine.name == name:
                self._cluster.kill_engine(engine)

    def _kill_part(self) -> None:
        self._cluster.kill_part(self._random.randrange(self._cluster.parts))

    def _seconds(self) -> float:
        return self._random.choice([0.05, 0.5, 3.0, 8.0, 20.0]) * self._random.random()

    def _freeze_shard(self) -> None:
        shard = self._cluster.shards.get(self._machine())
        if shard is not None:
            self._cluster.freeze(shard.incarnation, self._seconds())

    def _freeze_engine(self) -> None:
        if self._cluster.engines:
            engine = self._cluster.engines[self._random.choice([*self._cluster.engines])]
            self._cluster.freeze(engine.incarnation, self._seconds())

    def _freeze_worker(self) -> None:
        if self._cluster.engines:
            engine = self._cluster.engines[self._random.choice([*self._cluster.engines])]
            self._cluster.freeze(engine.worker, self._seconds())

    def _freeze_part(self) -> None:
        part = self._cluster.directory.get(self._random.randrange(self._cluster.parts))
        if part is not None:
            self._cluster.freeze(part.incarnation, self._seconds())

    def _cut(self) -> None:
        cluster = self._cluster
        one, other = self._random.sample([*cluster.machines, DIRECTORY_MACHINE], 2)
        cuts = {(one, other)} | ({(other, one)} if self._random.random() < 0.5 else set())
        seconds = self._seconds()
        cluster.story.tell(f"cut for {seconds:.1f} s: {sorted(cuts)}")
        cluster.network.cuts |= cuts
        self._later(seconds, lambda: cluster.network.cuts.difference_update(cuts))

    def _set(self, name: str, value: float) -> None:
        before = {"loss": 0.0, "repeats": 0.0, "damage": 0.0, "delay": 0.001}[name]
        network = self._cluster.network
        self._cluster.story.tell(f"network: {name} {value}")
        setattr(network, name, value)
        self._later(self._seconds(), lambda: setattr(network, name, before))

    def _lose(self) -> None:
        self._set("loss", self._random.choice([0.01, 0.1, 0.5]))

    def _slow(self) -> None:
        self._set("delay", self._random.choice([0.02, 0.1, 0.5]))

    def _repeat(self) -> None:
        self._set("repeats", 0.3)

    def _damage(self) -> None:
        self._set("damage", self._random.choice([0.01, 0.3]))

    def _turn_clock(self) -> None:
        """The wall clock of a machine jumps, also backwards."""
        cluster = self._cluster
        machine = self._random.choice([*cluster.machines.values(), cluster.head])
        seconds = self._random.uniform(-3600, 3600)
        cluster.story.tell(f"the clock of {machine.name} jumps by {seconds:.0f} s")
        machine.clock.wall_offset += seconds

    def _task(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._cluster.loop.start(coroutine)

    def _clear(self) -> None:
        self._task(self._cluster.clear(self._random.choice([None, *SPACES])))

    def _clear_and_kill(self) -> None:
        """A clear, and a shard that ends while engines fill what the clear came for."""
        self._clear()
        name = self._machine()
        self._later(self._random.uniform(0, 0.5), lambda: self._cluster.kill_shard(name))

    def _evict(self) -> None:
        name = self._machine()
        keys = b"".join(self._cluster.some_keys(name, 5))
        self._task(self._cluster.operate(name, "evict", keys))

    def _pin(self) -> None:
        name = self._machine()
        keys = b"".join(self._cluster.some_keys(name, 10))
        self._task(self._cluster.operate(name, "pin", keys, self._random.random() < 0.7))

    def _move(self) -> None:
        name, to = self._machine(), self._machine()
        keys = b"".join(self._cluster.some_keys(name, 5))
        move = encode(Move(keys=keys, to=to, within=5.0))
        self._task(self._cluster.operate(name, "move", move))

    def _leave(self) -> None:
        """A node hands over what only it holds, and ends, maybe before it is done."""
        name = self._machine()
        self._task(self._cluster.operate(name, "drain", encode(Drain(within=5.0))))
        self._later(self._random.uniform(0, 6), lambda: self._cluster.kill_shard(name))

    def _break_disk(self) -> None:
        name = self._machine()
        disk = self._cluster.machines[name].disk
        if disk is None:
            return
        what = self._random.choice(["read_only", "broken", "gone", "stuck", "slow", "lies", "sync"])
        self._cluster.story.tell(f"disk of {name}: {what}")
        if what == "slow":
            disk.pace = self._random.choice([0.1, 1.0])
        elif what == "lies":
            disk.lies = 0.3
        elif what == "sync":
            disk.sync()
        else:
            setattr(disk, what, True)

    def _break_bucket(self) -> None:
        bucket = self._cluster.bucket
        if bucket is None:
            return
        what = self._random.choice(["down", "denied", "fails", "hangs", "lies", "pace"])
        self._cluster.story.tell(f"the bucket: {what}")
        before = getattr(bucket, what)
        setattr(bucket, what, {"down": True, "denied": True, "pace": 1.0}.get(what, 0.3))
        self._later(self._seconds(), lambda: setattr(bucket, what, before))

    def _fill_memory(self) -> None:
        machine = self._cluster.machines[self._machine()]
        machine.full = True
        self._later(self._seconds(), lambda: setattr(machine, "full", False))
