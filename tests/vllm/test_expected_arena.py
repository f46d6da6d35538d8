"""A worker guesses its arena, and registers it before vLLM captures graphs; steps have the last
word.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmkv_ray.arena import ArenaReader, ArenaWriter
from lmkv_ray.arena.names import arena_name
from lmkv_ray.transfer import DeviceEngine
from lmkv_ray.transfer.host_device import HostDevice
from lmkv_ray.vllm.engine.metadata import ArenaRef, Share, StepMetadata
from lmkv_ray.vllm.worker.half import WorkerHalf
from tests.vllm.conftest import wait_for
from tests.vllm.test_worker import worker

pytestmark = pytest.mark.vllm

EXTENT = 1 << 20


class PinningDevice(HostDevice):
    """Notes what is registered, and by whom."""

    def __init__(self) -> None:
        self.pinned_at: dict[int, int] = {}
        self.threads: list[str] = []

    def register(self, address: int, nbytes: int) -> None:
        self.pinned_at[address] = nbytes
        self.threads.append(threading.current_thread().name)

    def unregister(self, address: int) -> None:
        del self.pinned_at[address]


@pytest.fixture
def namespace() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def make_arena(namespace: str) -> Iterator[Callable[[str], ArenaWriter]]:
    made: list[ArenaWriter] = []

    def make(node: str) -> ArenaWriter:
        writer = ArenaWriter.create(arena_name(namespace, node), 4 << 20, extent_bytes=EXTENT)
        writer.assign_extent(0, 64 << 10)
        writer.assign_extent(2, 64 << 10)
        made.append(writer)
        return writer

    yield make
    for writer in made:
        writer.close()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PinningDevice:
    """Of all engines that are opened."""
    device = PinningDevice()

    def open_engine(layouts: Any, *, settings: Any, gpu: Any, **cache: int) -> DeviceEngine:
        return DeviceEngine(
            layouts, device, ring_bytes=settings.gpu_ring_bytes, direct_bytes=0, **cache
        )

    monkeypatch.setattr("lmkv_ray.vllm.worker.pages.open_engine", open_engine)
    return device


@pytest.fixture
def start(namespace: str) -> Iterator[Callable[[], WorkerHalf]]:
    made: list[WorkerHalf] = []

    def start() -> WorkerHalf:
        made.append(worker(0, ray_namespace=namespace)[0])
        return made[-1]

    yield start
    for half in made:
        half.shutdown()


def step(half: WorkerHalf, arena: ArenaWriter) -> None:
    ref = ArenaRef(arena.path, arena.arena_id, {0: Share((0,))})
    half.begin_loads(StepMetadata((ref,), [], [], idle=False))


def arena_of(half: WorkerHalf) -> ArenaReader:
    assert half._arena is not None
    return half._arena[1]


def test_the_nodes_arena_is_pinned_before_the_first_step(
    device: PinningDevice,
    make_arena: Callable[[str], ArenaWriter],
    start: Callable[[], WorkerHalf],
) -> None:
    arena = make_arena("node")
    half = start()
    assert list(device.pinned_at.values()) == [EXTENT, EXTENT]
    assert set(device.threads) == {threading.current_thread().name}, "over when it is registered"
    assert half._arena is None, "a guess is used for nothing"
    before = dict(device.pinned_at)
    step(half, arena)
    used = arena_of(half)
    assert used.arena_id == arena.arena_id
    wait_for(lambda: not used.grown)
    assert device.pinned_at == before, "the same mapping"
    assert len(device.threads) == 2


def test_a_wrong_guess_is_unpinned_with_the_first_step(
    device: PinningDevice,
    make_arena: Callable[[str], ArenaWriter],
    start: Callable[[], WorkerHalf],
) -> None:
    make_arena("node")
    half = start()
    guessed = set(device.pinned_at)
    assert len(guessed) == 2
    right = make_arena("other")
    step(half, right)
    assert arena_of(half).arena_id == right.arena_id
    wait_for(lambda: len(device.pinned_at) == 2 and not guessed & set(device.pinned_at))


@pytest.mark.parametrize("arenas", [0, 2])
def test_where_there_is_nothing_to_guess_the_first_step_says_it(
    arenas: int,
    device: PinningDevice,
    make_arena: Callable[[str], ArenaWriter],
    start: Callable[[], WorkerHalf],
) -> None:
    for number in range(arenas):
        make_arena(f"node{number}")
    half = start()
    assert not device.threads
    arena = make_arena("mine")
    step(half, arena)
    wait_for(lambda: len(device.pinned_at) == 2)
    assert set(device.threads) == {"lmkv-register"}
