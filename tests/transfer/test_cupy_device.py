"""The CuPy device as far as it goes without a GPU: over a faked CuPy; and batched copies."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.errors import UnsupportedError
from lmkv_ray.kernels import pages
from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.transfer import Gpu, HostEngine, Load, Save, open_engine
from lmkv_ray.transfer.batched import _ARGUMENTS, BatchedCopy, _Attributes
from lmkv_ray.transfer.cupy_device import CupyDevice
from lmkv_ray.transfer.device import Device, DeviceError, Direction
from lmkv_ray.transfer.host_device import HostDevice
from tests.kernels.backends import gpu_missing
from tests.transfer.fake_arena import FakeArena
from tests.transfer.fake_cupy import NOT_READY, fake_cupy
from tests.transfer.test_engines import wait_ended, wait_until

LAYOUT = ChunkLayout((Run(0, 80, 64), Run(1280, 64, 64)), 2, 16)
SETTINGS = load_settings({"gpu_ring_bytes": 1 << 20, "direct_copy_bytes": 65})


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    faked, host = fake_cupy(), HostDevice()
    monkeypatch.setattr(pages, "import_cupy", lambda: faked)
    monkeypatch.setattr(pages, "prepare", lambda: None)
    monkeypatch.setattr(pages, "gather", lambda launch, at, *, stream: host.gather(0, launch, at))
    monkeypatch.setattr(pages, "scatter", lambda launch, at, *, stream: host.scatter(0, launch, at))
    return faked


def test_an_engine_on_it_saves_and_loads(cupy: Any) -> None:
    cache = np.random.default_rng(0).integers(1, 256, 2304, np.uint8)
    arena = FakeArena(4, LAYOUT.chunk_bytes)
    engine = open_engine(
        [LAYOUT],
        cache=cache.ctypes.data,
        cache_bytes=len(cache),
        settings=SETTINGS,
        gpu=Gpu(0, lambda: 7),
    )
    engine.attach(arena, [0])
    wait_until(lambda: bool(cupy.cuda.runtime.registered))
    slots, generations = np.array([3, 1]), np.zeros(2, np.uint64)
    before = cache.copy()
    engine.begin_saves([Save(1, slots, np.array([0, 7, 3, 4]), 1e18)])
    assert wait_ended(engine).ok
    engine.begin_loads([Load(1, slots, generations, np.array([8, 9, 10, 11]))], idle=True)
    assert wait_ended(engine).ok
    for run in LAYOUT.runs:
        for source, target in zip([0, 7, 3, 4], [8, 9, 10, 11], strict=True):
            at, to = run.offset + source * run.stride, run.offset + target * run.stride
            assert (cache[to : to + run.nbytes] == before[at : at + run.nbytes]).all()
    cupy.cuda.runtime.broken = 700
    engine.begin_loads([Load(1, slots, generations, np.array([8, 9, 10, 11]))], idle=True)
    assert not wait_ended(engine).ok
    engine.close()
    assert cupy.cuda.runtime.registered == {}


def test_statuses_are_answers_or_errors(cupy: Any) -> None:
    device: Device = CupyDevice(0, lambda: 7)
    stream = device.stream()
    event = device.record(stream)
    assert device.done(event)
    cupy.cuda.runtime.broken = NOT_READY
    assert not device.done(event)
    assert not device.idle(stream)
    cupy.cuda.runtime.broken = 700
    with pytest.raises(DeviceError, match="700"):
        device.done(event)
    one = np.ones(1, np.int64)
    with pytest.raises(DeviceError, match="700"):
        device.copy(stream, Direction.TO_DEVICE, one, one, one, registered=True)


def test_a_device_that_is_not_there_is_refused(cupy: Any) -> None:
    with pytest.raises(UnsupportedError, match="GPU 3"):
        CupyDevice(3, lambda: 7)


@pytest.mark.skipif(not gpu_missing(), reason="there is a GPU")
def test_without_a_gpu_the_error_names_the_next_step() -> None:
    gpu = Gpu(0, lambda: 0)
    with pytest.raises(UnsupportedError, match="Next step"):
        open_engine([LAYOUT], cache=0, cache_bytes=2304, settings=SETTINGS, gpu=gpu)


def test_pages_in_host_memory_need_no_gpu() -> None:
    cache = np.zeros(2304, np.uint8)
    settings = load_settings()
    engine = open_engine([LAYOUT], cache=cache.ctypes.data, cache_bytes=2304, settings=settings)
    assert isinstance(engine, HostEngine)
    engine.close()


@pytest.mark.parametrize("attributes", [True, False])
def test_batches_are_cut_and_described_as_the_library_wants_them(attributes: bool) -> None:
    calls = []

    def batch(
        to: int,
        source: int,
        sizes: int,
        count: int,
        described: int | None,
        first: int | None,
        descriptions: int,
        failed: int,
        stream: int,
    ) -> int:
        columns = [
            np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(c)).tolist()
            for c in (to, source, sizes)
        ]
        for each in zip(*columns, strict=True):
            ctypes.memmove(*each)
        if described is not None:
            assert _Attributes.from_address(described).source_access_order == 1
            assert ctypes.c_size_t.from_address(first or 0).value == 0
        calls.append((count, descriptions, stream))
        return 0

    function = ctypes.CFUNCTYPE(ctypes.c_uint, *_ARGUMENTS)(batch)
    source, target = np.arange(70, dtype=np.uint8), np.zeros(70, np.uint8)
    at = np.arange(0, 70, 7)
    copies = BatchedCopy(function, attributes=attributes, most=4)
    copies.copy(9, at + target.ctypes.data, at + source.ctypes.data, np.full(10, 7))
    assert (target == source).all()
    assert calls == [(4, int(attributes), 9), (4, int(attributes), 9), (2, int(attributes), 9)]


def test_a_refused_batch_is_an_error() -> None:
    function = ctypes.CFUNCTYPE(ctypes.c_uint, *_ARGUMENTS)(lambda *_: 1)
    copies = BatchedCopy(function, attributes=True, most=4)
    one = np.ones(1, np.int64)
    with pytest.raises(DeviceError, match="error 1"):
        copies.copy(9, one, one, one)
