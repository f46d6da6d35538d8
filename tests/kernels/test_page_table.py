"""Nothing that lies outside its memory gets past the host; what does is exact."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.kernels import TARGET, PageLaunch, PageTable
from lmkv_ray.kernels.page_table import RUN, alignment
from lmkv_ray.layout import ChunkLayout, Run

LAYOUT = ChunkLayout((Run(0, 1024, 1024), Run(8192, 512, 512)), blocks=4, num_blocks=8)
CACHE = 8192 + 8 * 512
BUFFER = 2 * LAYOUT.chunk_bytes


def write(
    chunks: list[int],
    indices: list[int],
    blocks: list[int],
    *,
    room: int = 8,
    buffer_bytes: int = BUFFER,
    runs: range | None = None,
) -> tuple[PageLaunch, np.ndarray]:
    out = np.zeros(room, TARGET)
    arrays = (np.array(values, np.int64) for values in (chunks, indices, blocks))
    table = PageTable(LAYOUT, cache_bytes=CACHE)
    try:
        launch = table.write(out, *arrays, buffer_bytes=buffer_bytes, runs=runs)
    except IndexError:
        assert not any(map(any, out.tolist())), "written in spite of the error"
        raise
    return launch, out


def test_tables_are_as_pages_cu_declares_them() -> None:
    assert (RUN.itemsize, TARGET.itemsize) == (32, 16)
    runs = PageTable(LAYOUT, cache_bytes=CACHE).runs
    assert runs.tolist() == [(0, 1024, 0, 1024), (8192, 512, 4096, 512)]
    launch, out = write([0, LAYOUT.chunk_bytes], [3, 0], [7, 0])
    assert out[:2].tolist() == [(0, 3, 7), (LAYOUT.chunk_bytes, 0, 0)]
    assert launch == PageLaunch(targets=2, first_run=0, runs=2, page_bytes=1024, alignment=16)


@pytest.mark.parametrize(
    ("chunks", "indices", "blocks", "options"),
    [
        ([0], [0], [8], {}),
        ([0], [0], [-1], {}),
        ([0], [4], [0], {}),
        ([0], [-1], [0], {}),
        ([-1], [0], [0], {}),
        ([BUFFER - LAYOUT.chunk_bytes + 1], [3], [0], {}),
        ([0, 1 << 40], [0, 0], [0, 1], {}),
        ([0], [0, 1], [0], {}),
        ([0, 0], [0, 1], [0, 1], {"room": 1}),
        ([0], [0], [0], {"runs": range(1, 3)}),
        ([0], [0], [0], {"runs": range(-1, 1)}),
        ([0], [0], [0], {"runs": range(0, 2, 2)}),
        ([-4096], [0], [0], {}),  # only its first run would lie outside
        ([-4097], [0], [0], {"runs": range(1, 2)}),
        ([0], [0], [0], {"buffer_bytes": 4096 + 511}),
    ],
)
def test_what_lies_outside_is_refused(
    chunks: list[int], indices: list[int], blocks: list[int], options: dict[str, Any]
) -> None:
    with pytest.raises(IndexError):
        write(chunks, indices, blocks, **options)


def test_a_chunk_may_begin_outside_as_long_as_its_pages_are_inside() -> None:
    launch, _ = write([-4096], [0], [0], runs=range(1, 2), buffer_bytes=512)
    assert (launch.first_run, launch.runs, launch.page_bytes) == (1, 1, 512)
    write([-4096 - 512], [1], [0], runs=range(1, 2), buffer_bytes=512)
    with pytest.raises(IndexError):
        write([-4096 - 512], [0], [0], runs=range(1, 2), buffer_bytes=512)


@pytest.mark.parametrize("runs", [None, range(1, 1)])
def test_no_blocks_or_no_runs_is_no_launch(runs: range | None) -> None:
    blocks = [0] if runs is not None else []
    launch, _ = write(blocks, blocks, blocks, runs=runs)
    assert not launch.targets


def test_a_layout_beyond_the_allocation_is_refused() -> None:
    PageTable(LAYOUT, cache_bytes=CACHE)
    with pytest.raises(IndexError):
        PageTable(LAYOUT, cache_bytes=CACHE - 1)
    with pytest.raises(IndexError):
        PageTable(ChunkLayout((Run(-16, 1024, 1024),), 1, 8), cache_bytes=CACHE)


@given(st.lists(st.integers(-(1 << 40), 1 << 40), max_size=5))
def test_alignment_divides_everything_and_is_the_largest(numbers: list[int]) -> None:
    bits = int(np.bitwise_or.reduce(np.array(numbers, np.int64))) if numbers else 0
    found = alignment(bits)
    dividing = [a for a in (1, 2, 4, 8, 16) if all(n % a == 0 for n in numbers)]
    assert found == max(dividing)
