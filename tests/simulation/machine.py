"""A simulated machine: its clocks, processes, shared memory and disk."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from lmkv_ray.arena import ArenaReader, ArenaWriter
from lmkv_ray.arena.crews import Crews
from lmkv_ray.config import Settings
from lmkv_ray.errors import ArenaError
from lmkv_ray.messages import Owner
from lmkv_ray.policies import make_policy
from lmkv_ray.status import TierStatus
from lmkv_ray.tiers import Tier
from lmkv_ray.tiers.disk import DiskTier
from lmkv_ray.tiers.remote import RemoteTier
from lmkv_ray.tiers.remote.objects import Objects
from lmkv_ray.transports import ObjectStoreServer, ObjectStoreTransport, Server, Transport
from tests.simulation.bucket import Bucket
from tests.simulation.disk import SimulatedDisk
from tests.simulation.loop import VirtualLoop
from tests.simulation.transport import SimulatedServer

FOLDER = Path("/simulated")
DISK_BYTES = 4 << 20
PIDS = itertools.count(1 << 22)  # beyond what Linux gives to processes


class SimulatedClock:
    """See ``lmkv_ray.clock.Clock``.

    Args:
        loop: has the virtual time.
        random: for random bytes, and for how far this machine's clocks are off.
    """

    def __init__(self, loop: VirtualLoop, random: Random) -> None:
        self._loop = loop
        self._random = random
        self._boot = random.uniform(0, 1e6)
        self.wall_offset = 1.7e9 + random.uniform(-5, 5)

    def monotonic(self) -> float:
        return self._boot + self._loop.time()

    def wall(self) -> float:
        return self.wall_offset + self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def random_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)


class SimulatedMachine:
    """See ``lmkv_ray.node.Machine``. Engines and shards of one node run on it.

    Args:
        name: the node's id.
        loop: has the virtual time.
        random: for all that is a matter of chance.
        disk: whether it has a disk.
    """

    def __init__(self, name: str, loop: VirtualLoop, random: Random, *, disk: bool) -> None:
        self.name = name
        self.host = f"host {name}"
        self.clock = SimulatedClock(loop, random)
        self.processes: set[Owner] = set()
        """Those that live."""
        self.process = self.spawn()
        """The shard's."""
        self.readers: list[ArenaReader] = []
        """What the engines of this machine map."""
        self.disk = SimulatedDisk(self.clock, random, DISK_BYTES) if disk else None
        self._random = random
        self.bucket: Bucket | None = None
        """The object store that all machines share; None: there is none."""
        self.card: Transport | None = None
        """Reads the memory of other machines, as with RDMA; None: it has none."""
        self.full = False
        """Whether /dev/shm has no room for an arena."""
        self.writer: ArenaWriter | None = None

    def spawn(self) -> Owner:
        """A new process."""
        owner = Owner(pid=next(PIDS), start=1)
        self.processes.add(owner)
        return owner

    def is_alive(self, process: Owner) -> bool:
        return Owner(pid=process.pid, start=process.start) in self.processes

    async def open_arena(self, settings: Settings, say: Callable[[str], None]) -> ArenaWriter:
        await self.clock.sleep(0.01)
        if self.full:
            raise ArenaError("/dev/shm is full.", next_step="make room.")
        writer = None
        for reader in reversed(self.readers):
            try:
                writer = ArenaWriter.adopt(reader._segment.path)
                break
            except ArenaError:
                continue
        if writer is None:
            assert settings.capacity is not None
            writer = ArenaWriter.create(f"simulated.{self.name}", int(settings.capacity))
        writer.crews = Crews(writer._tables.crews, self.is_alive)
        self.writer = writer
        return writer

    async def open_tiers(self, settings: Settings) -> tuple[list[Tier], list[TierStatus]]:
        tiers: list[Tier] = []
        if self.disk is not None:
            disk = await DiskTier.open(
                FOLDER,
                DISK_BYTES,
                make_policy=partial(make_policy, settings.eviction_policy),
                clock=self.clock,
                medium=self.disk,
            )
            tiers.append(disk)
        if self.bucket is not None:
            objects = Objects(self.bucket.store())
            tiers.append(await RemoteTier.over(objects, None, self.clock))
        return tiers, []

    def transports(self, arena: ArenaWriter) -> list[Transport]:
        by_asking = ObjectStoreTransport(self.clock, batch_bytes=256 << 10)
        return [by_asking] if self.card is None else [self.card, by_asking]

    def servers(self, reader: ArenaReader, arena: ArenaWriter) -> list[Server]:
        return [SimulatedServer(), ObjectStoreServer(reader)]
