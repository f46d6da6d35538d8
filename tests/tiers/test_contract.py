"""The contract of tiers, kept by each of ours."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from lmkv_ray.tiers.disk import writes
from lmkv_ray.tiers.remote import tier as remote
from tests.simulation.harness import SimulatedBucketHarness, SimulatedDiskHarness
from tests.tiers.contract import TierContract
from tests.tiers.harness import (
    DiskHarness,
    EncryptedDiskHarness,
    EncryptedRemoteHarness,
    Harness,
    RemoteHarness,
)


class TestDisk(TierContract):
    module: ClassVar = writes

    def make(self, directory: Path) -> Harness:
        return DiskHarness(directory)


class TestEncryptedDisk(TierContract):
    module: ClassVar = writes

    def make(self, directory: Path) -> Harness:
        return EncryptedDiskHarness(directory)


class TestRemote(TierContract):
    module: ClassVar = remote

    def make(self, directory: Path) -> Harness:
        return RemoteHarness(directory)


class TestEncryptedRemote(TierContract):
    module: ClassVar = remote

    def make(self, directory: Path) -> Harness:
        return EncryptedRemoteHarness(directory)


class TestSimulatedDisk(TierContract):
    module: ClassVar = writes

    def make(self, directory: Path) -> Harness:
        return SimulatedDiskHarness(directory)


class TestSimulatedBucket(TierContract):
    module: ClassVar = remote

    def make(self, directory: Path) -> Harness:
        return SimulatedBucketHarness(directory)
