"""Tiers over media that can be damaged, slowed down and taken away. One harness for each kind."""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.fetch import Fetch, Outcome
from lmkv_ray.keys import KeyArray, key_list
from lmkv_ray.policies import LRU
from lmkv_ray.tiers import Tier, TierChunk
from lmkv_ray.tiers.breaker import Breaker
from lmkv_ray.tiers.cipher import load_cipher
from lmkv_ray.tiers.disk import DiskTier
from lmkv_ray.tiers.disk.files import ChunkFiles
from lmkv_ray.tiers.remote import RemoteTier
from lmkv_ray.tiers.remote.objects import Objects, ObjectStore, open_objects

SLOT = 64 << 10
NBYTES = SLOT - 1000
"""Of most chunks: no whole number of pages."""
COUNT = 12
SPACE = 7
SECONDS = 30.0


def some_keys(count: int = COUNT, seed: int = 0) -> KeyArray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)


def content_of(key: bytes, nbytes: int = NBYTES) -> np.ndarray:
    """Bytes that only this key has; never zero."""
    return np.resize(np.frombuffer(key, np.uint8), nbytes) | np.uint8(1)


def slots(count: int, size: int = SLOT) -> list[np.ndarray]:
    """Memory that is aligned as an arena's."""
    memory = np.frombuffer(mmap.mmap(-1, max(count, 1) * size), np.uint8)
    return [memory[i * size : (i + 1) * size] for i in range(count)]


def chunk(
    key: bytes, *, nbytes: int = NBYTES, space: int = SPACE, intact: Callable[[], bool] = bool
) -> TierChunk:
    """A chunk of a key, in a slot; intact unless told otherwise."""
    slot = slots(1, -(-nbytes // 4096) * 4096)[0][:nbytes]
    slot[:] = content_of(key, nbytes)
    return TierChunk(key, space, slot, (lambda: True) if intact is bool else intact)


def secret(path: Path, text: str) -> Path:
    """A file with a secret, for this user only."""
    path.touch(0o600)
    path.write_text(text)
    return path


async def store(tier: Tier, keys: KeyArray, **options: Any) -> list[bool]:
    return await tier.store([chunk(key, **options) for key in key_list(keys)])


async def fetch(
    tier: Tier, keys: KeyArray, into: Sequence[np.ndarray], within: float = SECONDS
) -> list[Outcome]:
    """All outcomes by position; checks that each key has exactly one."""
    outcomes = [outcome async for outcome in tier.fetch(Fetch(keys, into, within))]
    assert sorted(outcome.position for outcome in outcomes) == list(range(len(keys)))
    return sorted(outcomes, key=lambda outcome: outcome.position)


def arrived(slot: np.ndarray, key: np.ndarray, nbytes: int = NBYTES) -> bool:
    """The key's chunk is in the slot, and nothing was written behind it."""
    return bool(
        (slot[:nbytes] == content_of(key.tobytes(), nbytes)).all() and not slot[nbytes:].any()
    )


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens by itself."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (of things that have no event)
            await asyncio.sleep(0.005)


class Harness(Protocol):
    """A medium, and the tiers on it."""

    async def open(self) -> Tier:
        """A tier on the medium; it tries again quickly when the medium failed."""
        ...

    def damage(self, key: bytes) -> None:
        """Flip a bit of what is stored of a chunk."""
        ...

    def cut(self, key: bytes) -> None:
        """Lose the end of what is stored of a chunk."""
        ...

    def lose(self, key: bytes) -> None:
        """Lose a chunk without telling the tier."""
        ...

    def take_away(self) -> None:
        """Nothing works any more."""
        ...

    def bring_back(self) -> None:
        """It works again; what was stored may be gone."""
        ...

    def slow_down(self, seconds: float) -> None:
        """From now on reading a chunk takes so long."""
        ...

    def hold_writes(self) -> Callable[[], None]:
        """From now on writes hang, until the returned function is called."""
        ...


class TestFiles(ChunkFiles):
    """Files on a disk that can be slow."""

    __test__ = False
    seconds = 0.0
    """That a read takes."""
    writable = threading.Event()
    readable = threading.Event()
    writable.set()
    readable.set()

    def read(self, *args: Any) -> Any:
        threading.Event().wait(self.seconds)
        assert self.readable.wait(SECONDS)
        return super().read(*args)

    def write(self, *args: Any) -> bool:
        assert self.writable.wait(SECONDS)
        return super().write(*args)


class DiskHarness:
    """A directory of a disk."""

    capacity: int | None = 64 << 20

    def __init__(self, path: Path) -> None:
        self.path = path / "tier"

        class Files(TestFiles):
            writable, readable = threading.Event(), threading.Event()

        self.files = Files
        self.files.writable.set()
        self.files.readable.set()

    async def open(self, **options: Any) -> DiskTier:
        defaults: dict[str, Any] = {
            "make_policy": LRU,
            "clock": SYSTEM_CLOCK,
            "make_files": self.files,
            "patience": 0.0,
            "breaker": Breaker(first=0.01, longest=0.1),
        }
        capacity = options.pop("capacity", self.capacity)
        return await DiskTier.open(self.path, capacity, **defaults | options)

    def file(self, key: bytes) -> Path:
        """The file of a chunk."""
        (path,) = self.path.glob(f"??/{key.hex()}-*")
        return path

    def all_files(self) -> list[Path]:
        return [path for path in self.path.glob("*/*") if path.is_file()]

    def nbytes(self) -> int:
        """Bytes that files take on the medium."""
        return sum(path.stat().st_blocks * 512 for path in self.all_files())

    def damage(self, key: bytes) -> None:
        self.flip(key, 20_000)

    def flip(self, key: bytes, offset: int) -> None:
        content = bytearray(self.file(key).read_bytes())
        content[offset] ^= 16
        self.file(key).write_bytes(content)

    def cut(self, key: bytes) -> None:
        with self.file(key).open("rb+") as file:
            file.truncate(9000)

    def lose(self, key: bytes) -> None:
        self.file(key).unlink()

    def take_away(self) -> None:
        """Under its path there is something else now."""
        shutil.rmtree(self.path)
        self.path.write_text("not a directory")

    def bring_back(self) -> None:
        self.path.unlink()

    def slow_down(self, seconds: float) -> None:
        self.files.seconds = seconds

    def hold_writes(self) -> Callable[[], None]:
        self.files.writable.clear()
        return self.files.writable.set

    def hold_reads(self) -> Callable[[], None]:
        self.files.readable.clear()
        return self.files.readable.set


class EncryptedDiskHarness(DiskHarness):
    """The same with encryption."""

    async def open(self, **options: Any) -> DiskTier:
        key_file = self.path.with_name("key")
        if not key_file.exists():
            secret(key_file, "00" * 32)
        return await super().open(**{"key_file": key_file} | options)


class TestObjects(Objects):
    """A store that can be slow."""

    __test__ = False
    seconds = 0.0
    """That getting an object takes."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.writable = asyncio.Event()
        self.writable.set()

    async def get(self, name: str, most: int, within: float) -> Any:
        async with asyncio.timeout(within):
            await asyncio.sleep(self.seconds)
            return await super().get(name, most, within)

    async def put(self, name: str, parts: list[Any], within: float) -> None:
        await self.writable.wait()
        await super().put(name, parts, within)


class RemoteHarness:
    """A directory that is shared by many."""

    key_file: Path | None = None

    def __init__(self, path: Path) -> None:
        self.path = path / "store"
        self.objects = TestObjects(open_objects(f"file://{self.path}", {})._store)

    async def open(self) -> RemoteTier:
        return RemoteTier(self.objects, load_cipher(self.key_file), SYSTEM_CLOCK)

    def file(self, key: bytes) -> Path:
        (path,) = self.path.glob(f"chunks/??/{key.hex()}.*")
        return path

    def damage(self, key: bytes) -> None:
        content = bytearray(self.file(key).read_bytes())
        content[20_000] ^= 16
        self.file(key).write_bytes(content)

    def cut(self, key: bytes) -> None:
        os.truncate(self.file(key), 9000)

    def lose(self, key: bytes) -> None:
        self.file(key).unlink()

    def take_away(self) -> None:
        shutil.rmtree(self.path)
        self.path.write_text("not a directory")

    def bring_back(self) -> None:
        self.path.unlink()
        self.path.mkdir()

    def slow_down(self, seconds: float) -> None:
        self.objects.seconds = seconds

    def hold_writes(self) -> Callable[[], None]:
        self.objects.writable.clear()
        return self.objects.writable.set


class EncryptedRemoteHarness(RemoteHarness):
    """The same with encryption."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.key_file = secret(path / "key", "00" * 32)


HARNESSES: dict[str, Callable[[Path], Harness]] = {
    "disk": DiskHarness,
    "encrypted_disk": EncryptedDiskHarness,
    "remote": RemoteHarness,
    "encrypted_remote": EncryptedRemoteHarness,
}
