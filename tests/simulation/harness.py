"""The simulation's media as harnesses, on the clock of this machine: see ``TierContract``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.policies import LRU
from lmkv_ray.tiers.breaker import Breaker
from lmkv_ray.tiers.disk import DiskTier
from lmkv_ray.tiers.remote import RemoteTier
from tests.simulation.bucket import Bucket
from tests.simulation.disk import SimulatedDisk
from tests.tiers.harness import TestObjects

FOLDER = Path("/simulated")
CAPACITY = 64 << 20
DAMAGED = 20_000
"""Which byte of a stored chunk is damaged."""
LEFT = 9000
"""Bytes that are left of a chunk that is cut."""


class SimulatedDiskHarness:
    """A simulated disk, whose memory is the medium."""

    def __init__(self, _: Path) -> None:
        self.disk = SimulatedDisk(SYSTEM_CLOCK, Random(1))

    async def open(self) -> DiskTier:
        return await DiskTier.open(
            FOLDER,
            CAPACITY,
            make_policy=LRU,
            clock=SYSTEM_CLOCK,
            medium=self.disk,
            breaker=Breaker(first=0.01, longest=0.1),
        )

    def damage(self, key: bytes) -> None:
        self.disk.content(FOLDER, self._file(key))[DAMAGED] ^= 16

    def cut(self, key: bytes) -> None:
        del self.disk.content(FOLDER, self._file(key))[LEFT:]

    def lose(self, key: bytes) -> None:
        self.disk.lose(FOLDER, self._file(key))

    def take_away(self) -> None:
        self.disk.gone = True

    def bring_back(self) -> None:
        self.disk.gone = False

    def slow_down(self, seconds: float) -> None:
        self.disk.pace = seconds

    def hold_writes(self) -> Callable[[], None]:
        self.disk.stuck = True
        return self.disk.unstick

    def _file(self, key: bytes) -> str:
        (path,) = [name for name in self.disk.files(FOLDER) if key.hex() in name]
        return path


class SimulatedBucketHarness:
    """A simulated bucket."""

    def __init__(self, _: Path) -> None:
        self.bucket = Bucket(Random(1))
        self.bucket.pace = 0.0005
        self.objects = TestObjects(self.bucket.store())

    async def open(self) -> RemoteTier:
        return RemoteTier(self.objects, None, SYSTEM_CLOCK)

    def damage(self, key: bytes) -> None:
        content = bytearray(self.bucket.objects[self._name(key)])
        content[DAMAGED] ^= 16
        self.bucket.objects[self._name(key)] = bytes(content)

    def cut(self, key: bytes) -> None:
        self.bucket.objects[self._name(key)] = self.bucket.objects[self._name(key)][:LEFT]

    def lose(self, key: bytes) -> None:
        del self.bucket.objects[self._name(key)]

    def take_away(self) -> None:
        self.bucket.down = True

    def bring_back(self) -> None:
        self.bucket.down = False

    def slow_down(self, seconds: float) -> None:
        self.objects.seconds = seconds

    def hold_writes(self) -> Callable[[], None]:
        self.objects.writable.clear()
        return self.objects.writable.set

    def _name(self, key: bytes) -> str:
        (name,) = [name for name in self.bucket.objects if key.hex() in name]
        return name
