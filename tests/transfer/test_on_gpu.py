"""The engine on a real GPU; the same cases as on the shuffled device."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.transfer import DeviceEngine, Load, Save
from lmkv_ray.transfer.cupy_device import CupyDevice
from tests.kernels.backends import gpu_missing
from tests.transfer.cases import SLOTS, Case, cases, random_bytes
from tests.transfer.fake_arena import FakeArena
from tests.transfer.test_engines import wait_ended

WITHOUT_GPU = gpu_missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WITHOUT_GPU), reason=WITHOUT_GPU)]


def run(case: Case, *, load: bool) -> tuple[Any, Any]:
    """Cache and arena after a load or a save, and as they should be."""
    import cupy

    cache = random_bytes(1, case.cache_bytes)
    pages = cupy.zeros(case.cache_bytes, cupy.uint8)
    arena = FakeArena(SLOTS, case.slot_bytes, order=case.order)
    arena.data[:] = random_bytes(2, len(arena.data))
    expected = (
        (case.loaded(arena.data, cache), arena.data.copy())
        if load
        else (cache, case.saved(arena.data, cache))
    )
    engine = DeviceEngine(
        [case.layout],
        CupyDevice(0, lambda: int(cupy.cuda.get_current_stream().ptr)),
        cache=pages.data.ptr,
        cache_bytes=case.cache_bytes,
        ring_bytes=1 << 20 if case.ring_slot_bytes else 0,
        direct_bytes=case.direct_bytes,
    )
    engine.attach(arena, [0])
    pages.set(cache)  # on the model's stream
    if load:
        generations = np.zeros(len(case.slots), np.uint64)
        engine.begin_loads([Load(1, case.slots, generations, case.blocks, case.skip)], idle=True)
    else:
        engine.begin_saves([Save(1, case.slots, case.blocks, time.monotonic() + 60)])
    assert wait_ended(engine).ok
    engine.close()
    return (pages.get(), arena.data), expected


@settings(max_examples=50, deadline=None)
@given(cases())
def test_loads(case: Case) -> None:
    (cache, arena), expected = run(case, load=True)
    assert (cache == expected[0]).all()
    assert (arena == expected[1]).all()


@settings(max_examples=50, deadline=None)
@given(cases(whole=True))
def test_saves(case: Case) -> None:
    (cache, arena), expected = run(case, load=False)
    assert (cache == expected[0]).all()
    assert (arena == expected[1]).all()


def test_graphs_can_be_captured_between_prepare_and_attach() -> None:
    import cupy

    if cupy.cuda.runtime.is_hip:
        pytest.skip("CuPy captures no graphs on ROCm")
    layout = ChunkLayout((Run(0, 4096, 4096),), 1, 16)
    cache, arena = cupy.arange(65536 // 4, dtype=cupy.int32), FakeArena(4, layout.chunk_bytes)
    engine = DeviceEngine(
        [layout],
        CupyDevice(0, lambda: int(cupy.cuda.get_current_stream().ptr)),
        cache=cache.data.ptr,
        cache_bytes=cache.nbytes,
        ring_bytes=1 << 20,
        direct_bytes=1 << 20,
    )
    engine.prepare(arena, 60)
    assert engine._registration.covers(arena, arena.offsets(np.arange(4), layout.chunk_bytes)).all()
    counted = cupy.zeros(1000, cupy.int32)
    counted += 1  # compiled now: modules cannot be loaded while a graph is captured
    cupy.cuda.get_current_stream().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)  # as vLLM does
        counted += 1
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    assert (counted.get() == 2).all()
    engine.attach(arena, [0])
    engine.begin_saves([Save(1, np.arange(4), np.arange(4), time.monotonic() + 60)])
    assert wait_ended(engine).ok
    assert (arena.data == cache.get().view(np.uint8)[: len(arena.data)]).all()
    engine.close()
