"""The kernels against torch and the host copier, in every layout; on the host and on a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv_ray.kernels import PageAddresses, PageTable, pages
from lmkv_ray.transfer.host_copier import HostCopier
from lmkv_ray.transfer.targets import BlockTargets
from tests.kernels.backends import (
    Backend,
    Copy,
    GpuBackend,
    HostBackend,
    empty_targets,
    gpu_missing,
)
from tests.kernels.caches import LAYOUTS, Shape, guarded

GUARD = 256
WITHOUT_GPU = gpu_missing()
needs_gpu = pytest.mark.skipif(bool(WITHOUT_GPU), reason=WITHOUT_GPU)

BACKENDS = [
    pytest.param(HostBackend, id="host"),
    pytest.param(GpuBackend, id="gpu", marks=[pytest.mark.gpu, needs_gpu]),
]

paddings = st.sampled_from([(0, 0, 0, 0, 0)] * 3 + [(0, 0, 48, 0, 0), (0, 6, 0, 2, 0)])


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Pages of a few bytes to 40 KiB; with one head (MLA) and with several."""
    sizes = {
        "L": draw(st.integers(1, 3)),
        "B": draw(st.integers(2, 7)),
        "H": draw(st.sampled_from([1, 1, 2, 3])),
        "N": draw(st.sampled_from([1, 2, 3, 16])),
        "C": draw(st.sampled_from([1, 3, 4, 8, 64, 132, 256, 576])),
    }
    name, itemsize = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([1, 2, 4]))
    padding = tuple(p // itemsize * itemsize for p in draw(paddings))
    return Shape(name, sizes, itemsize, padding)  # type: ignore[arg-type]


@st.composite
def placements(draw: st.DrawFn, shape: Shape, per_chunk: int) -> BlockTargets:
    """Some blocks in any order, at different numbers of chunks in any order, some left free."""
    blocks = draw(st.permutations(range(shape.sizes["B"])))[: draw(st.integers(1, 7))]
    numbers = draw(st.permutations(range(len(blocks) + 3)))[: len(blocks)]
    gap = draw(st.sampled_from([0, 0, 16, 8, 4, 2, 1]))
    chunk_bytes = shape.block_bytes() * per_chunk + gap
    targets = np.array(numbers, np.int64)
    return BlockTargets(
        targets // per_chunk * chunk_bytes, targets % per_chunk, np.array(blocks, np.int64)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_blocks_reach_their_chunk_and_come_back_elsewhere(
    backend: type[Backend], data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    per_chunk = data.draw(st.integers(1, 4))
    targets = data.draw(placements(shape, per_chunk))
    shift = st.sampled_from([0, 0, 0, 8, 4, 2, 1])
    layout = shape.chunk_layout(per_chunk)
    buffer_bytes = int(targets.chunks.max()) + layout.chunk_bytes
    cache = guarded(shape.nbytes(), data.draw(shift), seed=1, guard=GUARD)
    buffer = guarded(buffer_bytes, data.draw(shift), seed=2, guard=GUARD)
    grid_limit = data.draw(st.sampled_from([1, 2, 300]))

    table, targets_out = PageTable(layout, cache_bytes=shape.nbytes()), empty_targets(9)
    inner, outer = cache[GUARD:-GUARD], buffer[GUARD:-GUARD]

    def launch(direction: str, blocks: np.ndarray) -> None:
        it = table.write(
            targets_out, targets.chunks, targets.indices, blocks, buffer_bytes=buffer_bytes
        )
        backend().run(Copy(direction, table, it, targets_out, inner, outer, grid_limit))

    # Gather: as the host copier does it, not a byte more.
    before, expected = cache.copy(), buffer.copy()
    HostCopier(layout, inner, expected[GUARD:-GUARD]).save(targets)
    launch("gather", targets.blocks)
    np.testing.assert_array_equal(buffer, expected)
    np.testing.assert_array_equal(cache, before)

    # Scatter into other blocks: as torch copies block to block through the engine's views.
    others = np.array(
        data.draw(st.permutations(range(shape.sizes["B"])))[: len(targets.blocks)], np.int64
    )
    expected_cache = cache.copy()
    shape.view(expected_cache[GUARD:-GUARD])[:, torch.from_numpy(others)] = shape.view(inner)[
        :, torch.from_numpy(targets.blocks)
    ]
    launch("scatter", others)
    np.testing.assert_array_equal(cache, expected_cache)
    np.testing.assert_array_equal(buffer, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_buffer_smaller_than_a_chunk_takes_it_in_pieces(
    backend: type[Backend], name: str
) -> None:
    shape = Shape(name, {"L": 4, "B": 5, "H": 2, "N": 16, "C": 64}, 2, (0, 0, 0, 0, 0))
    layout = shape.chunk_layout(2)
    cache = guarded(shape.nbytes(), 0, seed=3, guard=0)
    table, targets_out = PageTable(layout, cache_bytes=len(cache)), empty_targets(2)
    chunk, blocks = np.zeros(layout.chunk_bytes, np.uint8), np.array([4, 1], np.int64)
    HostCopier(layout, cache, chunk).save(
        BlockTargets(np.zeros(2, np.int64), np.arange(2, dtype=np.int64), blocks)
    )
    found = []
    for r, (run, offset) in enumerate(zip(layout.runs, layout.run_offsets(), strict=True)):
        for index in range(2):  # one page at a time: the smallest buffer there can be
            buffer = np.zeros(run.nbytes, np.uint8)
            launch = table.write(
                targets_out,
                np.array([-offset - index * run.nbytes]),
                np.array([index]),
                blocks[index : index + 1],
                buffer_bytes=len(buffer),
                runs=range(r, r + 1),
            )
            backend().run(Copy("gather", table, launch, targets_out, cache, buffer, 4))
            found.append(buffer)
    np.testing.assert_array_equal(np.concatenate(found), chunk)


@given(shapes(), st.sampled_from([0, 8, 4, 2, 1]), st.integers(1, 1 << 20))
def test_words_are_as_wide_as_every_address_and_size_allows(
    shape: Shape, shift: int, grid_limit: int
) -> None:
    layout = shape.chunk_layout(2)
    table = PageTable(layout, cache_bytes=shape.nbytes())
    block = np.array([shape.sizes["B"] - 1])
    zeros, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    launch = table.write(empty_targets(1), zeros, one, block, buffer_bytes=layout.chunk_bytes)
    at = PageAddresses(1 << 20, (1 << 21) + shift, 1 << 22, 1 << 23)
    grid, word, parts = pages.grid_and_word(launch, at, grid_limit)
    numbers = [shift, *(number for row in table.runs.tolist() for number in row)]
    assert word == max(w for w in (1, 2, 4, 8, 16) if all(n % w == 0 for n in numbers))
    largest = max(run.nbytes for run in layout.runs)
    assert (parts - 1) * word * 128 < largest <= parts * word * 128
    assert 1 <= grid <= grid_limit
    assert (grid - 1) * 8 < len(layout.runs) * parts


def test_more_tiles_than_a_kernel_counts_are_refused() -> None:
    from lmkv_ray.kernels import PageLaunch

    at = PageAddresses(0, 0, 0, 0)
    launch = PageLaunch(targets=1 << 20, first_run=0, runs=32, page_bytes=1 << 17, alignment=16)
    with pytest.raises(IndexError, match="tiles"):
        pages.grid_and_word(launch, at, 16)


@pytest.mark.skipif(not WITHOUT_GPU, reason="there is a GPU")
def test_without_a_gpu_the_error_names_the_next_step() -> None:
    from lmkv_ray.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="Next step"):
        pages.prepare()


def test_without_cupy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from lmkv_ray.errors import UnsupportedError

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedError, match=r"lmkv-ray\[cuda\]"):
        pages.import_cupy()
