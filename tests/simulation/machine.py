"""A simulated machine: its clocks, processes, shared memory and disk."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from random import Random
from typing import cast

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaReader, ArenaWriter
from lmkv_ray.arena.crews import Crews
from lmkv_ray.config import Settings
from lmkv_ray.errors import ArenaError
from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.keys import KeyArray, key_list
from lmkv_ray.messages import Owner
from lmkv_ray.status import TierStatus
from lmkv_ray.tiers import Tier, TierChunk
from lmkv_ray.transports import NixlSource, ObjectStoreTransport, Transport
from tests.simulation.loop import VirtualLoop
from tests.tiers.memory_tier import MemoryTier

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


class SimulatedDisk(MemoryTier):
    """A disk tier that outlives the shard; it may be slow, full, or not there."""

    def __init__(self, random: Random) -> None:
        super().__init__("disk")
        self.random = random
        self.works = True
        self.pace = 0.001
        """Mean seconds for a chunk."""

    async def lookup(self, keys: KeyArray, within: float) -> npt.NDArray[np.bool_]:
        if not self.works:
            return np.zeros(len(keys), np.bool_)
        return await super().lookup(keys, within)

    async def fetch(self, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + fetch.within
        for position, key in enumerate(key_list(fetch.keys)):
            pause = self.random.expovariate(1 / self.pace)
            if loop.time() + pause > deadline:
                yield Outcome(position, failure=Failure.LATE)
                continue
            await asyncio.sleep(pause)
            found = self.chunks.get(key) if self.works else None
            if found is None:
                yield Outcome(position, failure=Failure.MISSING)
                continue
            fetch.destinations[position][: len(found[1])] = np.frombuffer(found[1], np.uint8)
            yield Outcome(position, len(found[1]))

    async def store(self, chunks: Sequence[TierChunk]) -> list[bool]:
        stored = []
        for chunk in chunks:
            half = len(chunk.data) // 2
            first = chunk.data[:half].tobytes()
            await asyncio.sleep(self.random.expovariate(1 / self.pace))
            data = first + chunk.data[half:].tobytes()
            stored.append(self.works and chunk.intact())
            if stored[-1]:
                self.chunks[chunk.key] = (chunk.space, data)
        return stored

    async def clear(self, space: int | None, number: int) -> None:
        await super().clear(space, number)
        self.cleared = max(self.cleared, number)


class _NoNixl:
    obstacle = "there is no NIXL in a simulation"

    def start(self) -> None:
        pass

    async def locate(self, keys: bytes, known: str) -> bytes:
        raise NotImplementedError


class SimulatedMachine:
    """See ``lmkv_ray.node.Machine``. Engines and shards of one node run on it.

    Args:
        name: the node's id.
        loop: has the virtual time.
        random: for all that is a matter of chance.
        disk: whether it has one.
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
        self.disk = SimulatedDisk(random) if disk else None
        self.card: Transport | None = None
        """Reads the memory of other machines, if it has one."""
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
        return ([] if self.disk is None else [cast(Tier, self.disk)]), []

    def transports(self, arena: ArenaWriter) -> list[Transport]:
        by_asking = ObjectStoreTransport(self.clock, batch_bytes=256 << 10)
        return [by_asking] if self.card is None else [self.card, by_asking]

    def nixl_source(self, reader: ArenaReader, arena: ArenaWriter) -> NixlSource:
        return cast(NixlSource, _NoNixl())
