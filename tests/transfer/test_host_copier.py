"""Copies between arena and pages, against a per-block reference, over any order of blocks."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.transfer.host_copier import HostCopier, plan_copies
from lmkv_ray.transfer.targets import BlockTargets, target_blocks

NUM_BLOCKS = 24


Case = tuple[ChunkLayout, np.ndarray, np.ndarray, int]
"""A layout, chunk offsets in the arena, block ids, and blocks to skip."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nbytes = draw(st.lists(st.sampled_from([8, 24]), min_size=1, max_size=3))
    if draw(st.booleans()):  # a run per layer
        starts = np.cumsum([0, *(n * NUM_BLOCKS for n in nbytes)])
        runs = [Run(int(s), n, n) for s, n in zip(starts, nbytes, strict=False)]
    else:  # all layers of a block side by side, padded
        starts = np.cumsum([0, *nbytes])
        stride = int(starts[-1]) + 8
        runs = [Run(int(s), stride, n) for s, n in zip(starts, nbytes, strict=False)]
    per_chunk = draw(st.integers(1, 4))
    layout = ChunkLayout(tuple(runs), per_chunk, NUM_BLOCKS)
    slots = draw(st.permutations(range(8)))
    if draw(st.booleans()):
        slots = sorted(slots, reverse=draw(st.booleans()))
    blocks = draw(st.permutations(range(NUM_BLOCKS)))
    if draw(st.booleans()):
        blocks = sorted(blocks, reverse=draw(st.booleans()))
    skip = draw(st.integers(0, per_chunk - 1))
    count = draw(st.integers(1, min(NUM_BLOCKS, 8 * per_chunk - skip)))
    size = layout.chunk_bytes + draw(st.sampled_from([0, 16]))
    return layout, np.array(slots) * size, np.array(blocks[:count]), skip


def reference_save(
    layout: ChunkLayout, cache: np.ndarray, arena: np.ndarray, targets: BlockTargets
) -> None:
    for chunk, index, block in zip(targets.chunks, targets.indices, targets.blocks, strict=True):
        for run, offset in zip(layout.runs, layout.run_offsets(), strict=True):
            to = chunk + offset + index * run.nbytes
            source = run.offset + block * run.stride
            arena[to : to + run.nbytes] = cache[source : source + run.nbytes]


@given(cases(), st.randoms(use_true_random=False))
def test_save_and_load_agree_with_copying_block_by_block(
    case: Case, source_of_seeds: random.Random
) -> None:
    layout, chunks, blocks, skip = case
    cache_bytes = max(r.offset + (NUM_BLOCKS - 1) * r.stride + r.nbytes for r in layout.runs)
    generator = np.random.default_rng(source_of_seeds.randrange(1 << 32))
    cache = generator.integers(0, 256, cache_bytes, np.uint8)
    arena = generator.integers(0, 256, 8 * (layout.chunk_bytes + 16), np.uint8)
    targets = target_blocks(chunks, blocks, skip=skip, per_chunk=layout.blocks)

    expected = arena.copy()
    reference_save(layout, cache, expected, targets)
    HostCopier(layout, cache, arena).save(targets)
    assert (arena == expected).all()

    other = generator.integers(0, 256, cache_bytes, np.uint8)
    untouched = other.copy()
    HostCopier(layout, other, arena).load(targets)
    for run in layout.runs:
        for block in range(NUM_BLOCKS):
            at = slice(
                run.offset + block * run.stride, run.offset + block * run.stride + run.nbytes
            )
            source = cache if block in blocks else untouched
            assert (other[at] == source[at]).all()


@given(cases())
def test_a_plan_covers_every_block_once_and_in_order(case: Case) -> None:
    layout, chunks, blocks, skip = case
    targets = target_blocks(chunks, blocks, skip=skip, per_chunk=layout.blocks)
    rows = [
        (c.chunk + i * c.chunk_step, c.index + i * c.index_step, c.block + i * c.block_step)
        for c in plan_copies(targets)
        for i in range(c.count)
    ]
    assert rows == list(
        zip(targets.chunks.tolist(), targets.indices.tolist(), targets.blocks.tolist(), strict=True)
    )


@pytest.mark.parametrize("step", [1, -1])
def test_a_prompt_in_order_is_one_copy_per_layer(step: int) -> None:
    blocks = np.arange(20)[::step]
    assert len(plan_copies(target_blocks(np.arange(20) * 64, blocks, skip=0, per_chunk=1))) == 1


@pytest.mark.parametrize(
    ("chunk", "block"), [(0, NUM_BLOCKS), (0, -1), (-8, 0), (1 << 40, 0), (57, 0)]
)
def test_nothing_is_copied_out_of_bounds(chunk: int, block: int) -> None:
    layout = ChunkLayout((Run(0, 8, 8),), 1, NUM_BLOCKS)
    copier = HostCopier(layout, np.zeros(8 * NUM_BLOCKS, np.uint8), np.zeros(64, np.uint8))
    targets = target_blocks(np.array([chunk]), np.array([block]), skip=0, per_chunk=1)
    for copy in (copier.load, copier.save):
        with pytest.raises(IndexError):
            copy(targets)
