"""The GPU's wrappers and benchmark on a CuPy of the host, whose names are the real ones."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmkv_ray.kernels import TARGET, PageAddresses, PageTable, pages
from lmkv_ray.layout import ChunkLayout, Run
from tests.kernels.fake_cupy import FakeCupy


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    caches = (pages._module, pages._kernel, pages._full_grid)
    for cache in caches:
        cache.cache_clear()
    yield fake
    for cache in caches:
        cache.cache_clear()


def test_every_name_exists_in_cupy() -> None:
    import cupy

    def names(fake: object, real: object, path: str) -> None:
        for name, value in vars(fake).items():
            if not name.startswith("_"):
                assert hasattr(real, name), f"{path}.{name}"
                if hasattr(value, "__dict__") and not callable(value):
                    names(value, getattr(real, name), f"{path}.{name}")

    names(FakeCupy().cuda, cupy.cuda, "cupy.cuda")
    assert cupy.cuda.runtime.memcpyDefault == 4
    parameters = "(intptr_t dst, intptr_t src, size_t size, int kind, intptr_t stream)"
    assert parameters in cupy.cuda.runtime.memcpyAsync.__doc__
    assert "non_blocking" in cupy.cuda.Stream.__init__.__doc__


@pytest.mark.parametrize(("limit", "grid"), [(None, 6), (4, 4)])
def test_launches_go_to_the_stream_with_the_wanted_grid(
    cupy: FakeCupy, limit: int | None, grid: int
) -> None:
    layout = ChunkLayout((Run(0, 65536, 65536),), blocks=2, num_blocks=2)
    cache, buffer = np.arange(131072, dtype=np.uint32).view(np.uint8), np.zeros(131072, np.uint8)
    cache = cache[: len(buffer)]
    table, targets = PageTable(layout, cache_bytes=len(cache)), np.zeros(2, TARGET)
    zero, both = np.zeros(2, np.int64), np.arange(2)
    launch = table.write(targets, zero, both, both[::-1], buffer_bytes=len(buffer))
    addresses = (array.ctypes.data for array in (cache, buffer, table.runs, targets))
    pages.gather(launch, PageAddresses(*addresses), stream=7, grid_limit=limit)
    assert cupy.launches == [("gather_16", grid, 7)]
    assert bytes(buffer) == bytes(cache[65536:]) + bytes(cache[:65536])


def test_nothing_is_launched_for_nothing(cupy: FakeCupy) -> None:
    layout = ChunkLayout((Run(0, 16, 16),), blocks=1, num_blocks=1)
    none = np.zeros(0, np.int64)
    launch = PageTable(layout, cache_bytes=16).write(
        np.zeros(0, TARGET), none, none, none, buffer_bytes=16
    )
    pages.scatter(launch, PageAddresses(0, 0, 0, 0), stream=7)
    assert not cupy.launches


def test_a_part_that_fails_is_named_and_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import machine, packing, transfers, ttft
    from benchmarks.gpu.__main__ import main
    from benchmarks.table import Outcome

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(machine.Host, "scale", 1 << 16)
    monkeypatch.setattr(packing, "run", lambda *args: [])
    monkeypatch.setattr(transfers, "run", fail)
    monkeypatch.setattr(machine, "find", lambda: (machine.Host(), "no GPU"))
    absent = Outcome([], ["LMCache: not here"], [])
    monkeypatch.setattr(ttft, "run", lambda *args, **kwargs: absent)
    assert main(["--out", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert written["not_measured"] == ["LMCache: not here", "transfers: no room"]
    assert written["rows"]
    monkeypatch.setattr(transfers, "run", lambda *args: [])
    assert main(["--out", str(tmp_path)]) == 0, "what cannot be had here is no failure"
    monkeypatch.setattr(ttft, "run", fail)
    assert main(["--out", str(tmp_path)]) == 1


@pytest.mark.parametrize("gpu", [True, False])
def test_the_benchmark_of_copies_and_kernels_runs_to_its_end(
    gpu: bool, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu:
        request.getfixturevalue("cupy")
    elif not request.getfixturevalue("without_gpu"):
        pytest.skip("there is a GPU")
    from benchmarks.gpu import machine, transfers
    from benchmarks.gpu.__main__ import main
    from lmkv_ray.transfer.host_device import HostDevice

    for kind in (machine.Gpu, machine.Host):
        monkeypatch.setattr(kind, "scale", 1 << 17)
        monkeypatch.setattr(kind, "device", lambda self: HostDevice())
    monkeypatch.setattr(transfers, "LLAMA_8B", {"L": 2, "H": 2, "N": 16, "C": 64})
    monkeypatch.setattr(transfers, "RING_BYTES", 1 << 20)
    assert main(["--no-engines", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert bool(written["without_gpu"]) != gpu
    names = [row["name"] for row in written["rows"]]
    assert len(names) == len(set(names)) > 40
    assert all(row["value"] > 0 and row["ratio"] > 0 for row in written["rows"])
    assert (tmp_path / "bench-gpu.png").stat().st_size > 10_000


def test_the_break_even_is_where_plain_copies_stay_as_good_both_ways() -> None:
    from benchmarks.gpu.transfers import break_even

    slow, fast = (10.0, 10.0), (50.0, 50.0)
    assert break_even({4: (fast, slow), 8: (fast, (50.0, 40.0)), 16: (fast, fast)}) == 16
    assert break_even({4: (slow, fast), 8: (fast, slow), 16: (fast, fast), 32: (fast, fast)}) == 16
    assert break_even({4: (fast, (49.6, 49.6)), 8: (fast, fast)}) == 4
    assert break_even({4: (fast, slow), 8: (fast, slow)}) == 16
