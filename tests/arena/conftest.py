"""Small arenas, and other processes that use them."""

from __future__ import annotations

import multiprocessing
import secrets
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmkv_ray.arena import ArenaReader, ArenaWriter, this_process
from lmkv_ray.keys import KeyArray

CAPACITY = 4 << 20
SLOT = 64 << 10
SPACE = 7


def some_keys(count: int, seed: int = 0) -> KeyArray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)


def content_of(key: np.ndarray, nbytes: int = SLOT) -> np.ndarray:
    """Bytes that only this key has."""
    return np.resize(key.view(np.uint8), nbytes) ^ np.arange(nbytes).astype(np.uint8)


def fill(writer: ArenaWriter, slots: np.ndarray, keys: KeyArray) -> None:
    """Reserve, write and publish."""
    writer.reserve(slots, this_process())
    for slot, key in zip(slots.tolist(), keys, strict=True):
        writer.payload(slot)[:] = content_of(key)
    writer.publish(slots, keys, SLOT, SPACE)


@pytest.fixture
def name() -> str:
    return f"test{secrets.token_hex(6)}"


@pytest.fixture
def writer(name: str) -> Iterator[ArenaWriter]:
    writer = ArenaWriter.create(name, CAPACITY)
    yield writer
    writer.close()


@pytest.fixture
def reader(writer: ArenaWriter) -> Iterator[ArenaReader]:
    reader = ArenaReader.attach(writer.path, writer.arena_id)
    yield reader
    reader.close()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After every test: no file of ours has a name, whatever died."""
    yield
    assert not list(Path("/dev/shm").glob("lmkv-test*"))


Spawn = Callable[..., tuple[Any, Connection]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """``spawn(function, *args)`` runs ``function(connection, *args)`` in a new process."""
    context = multiprocessing.get_context("spawn")
    started = []

    def start(target: Callable[..., None], *args: object) -> tuple[Any, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *args), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
        return process, ours

    yield start
    for process, connection in started:
        process.kill()
        process.join()
        process.close()
        connection.close()
