"""Plans move the right bytes, in the fewest pieces, and never out of bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from lmkv_ray.kernels import TARGET, PageTable
from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.transfer.plan import Copies, CopyPlan
from lmkv_ray.transfer.planner import Planner
from tests.transfer.cases import SLOTS, Case, cases, random_bytes


def plan_of(case: Case) -> CopyPlan:
    planner = Planner(case.layout, slot_bytes=case.ring_slot_bytes, direct_bytes=case.direct_bytes)
    size = SLOTS * case.slot_bytes
    plan = planner.plan(
        case.chunks, case.blocks, skip=case.skip, arena_bytes=size, extent_bytes=size // 2
    )
    assert all(len(batch.blocks) <= planner.targets for batch in plan.batches())
    return plan


def plain(plan: CopyPlan) -> Copies:
    """All plain copies as one."""
    parts = list(plan.plain(5))
    assert len(parts) == plan.plain_steps(5)
    columns = ([getattr(p, name) for p in parts] for name in ("arena", "other", "nbytes"))
    return Copies(*(np.concatenate([np.empty(0, np.int64), *column]) for column in columns))


def each(copies: Copies) -> list[tuple[int, int, int]]:
    columns = copies.arena.tolist(), copies.other.tolist(), copies.nbytes.tolist()
    return list(zip(*columns, strict=True))


@given(cases())
def test_a_plan_carried_out_in_any_way_is_the_load(case: Case) -> None:
    plan = plan_of(case)
    arena, cache = random_bytes(1, SLOTS * case.slot_bytes), random_bytes(2, case.cache_bytes)
    expected = case.loaded(arena, cache)
    for a, c, n in each(plain(plan)):
        assert n > 0
        cache[c : c + n] = arena[a : a + n]
    layout, table = case.layout, PageTable(case.layout, cache_bytes=case.cache_bytes)
    for batch in plan.batches():
        ring = np.zeros(case.ring_slot_bytes, np.uint8)
        for a, r, n in each(batch.copies):
            assert n > 0
            assert r >= 0
            assert r + n <= len(ring)
            ring[r : r + n] = arena[a : a + n]
        # What the kernels check before a launch.
        out, targets = np.zeros(99, TARGET), (batch.chunks, batch.indices, batch.blocks)
        table.write(out, *targets, buffer_bytes=len(ring), runs=batch.runs)
        for chunk, index, block in zip(*(p.tolist() for p in targets), strict=True):
            for i in batch.runs:
                run, start = layout.runs[i], layout.run_offsets()[i]
                r, c = chunk + start + index * run.nbytes, run.offset + block * run.stride
                cache[c : c + run.nbytes] = ring[r : r + run.nbytes]
    assert (cache == expected).all()


@given(cases())
def test_every_byte_crosses_the_link_once(case: Case) -> None:
    plan = plan_of(case)
    size = SLOTS * case.slot_bytes
    times = np.zeros(size, np.int64)
    for a, _, n in [*each(plain(plan)), *each(plan.packed)]:
        times[a : a + n] += 1
        assert a // (size // 2) == (a + n - 1) // (size // 2), "an extent's border was crossed"
    expected = np.zeros(size, np.int64)
    for a, _, n in case.pairs():
        expected[a : a + n] += 1
    assert (times == expected).all()
    assert plan.rows[:, 5].max(initial=0) <= len(plan.packed)


def layers(count: int, page: int, blocks: int = 64, per_chunk: int = 4) -> ChunkLayout:
    runs = tuple(Run(i * blocks * page, page, page) for i in range(count))
    return ChunkLayout(runs, per_chunk, blocks)


def plan_chunks(
    layout: ChunkLayout, chunks: list[int], blocks: list[int], **sizes: int
) -> CopyPlan:
    planner = Planner(
        layout, slot_bytes=sizes.get("slot", 1 << 20), direct_bytes=sizes.get("direct", 4096)
    )
    at = np.array(chunks) * layout.chunk_bytes
    extent = sizes.get("extent", 1 << 30)
    return planner.plan(at, np.array(blocks), skip=0, arena_bytes=1 << 30, extent_bytes=extent)


def test_blocks_in_order_are_one_copy_a_layer() -> None:
    plan = plan_chunks(layers(3, 1024), [5], [8, 9, 10, 11])
    assert plain(plan).nbytes.tolist() == [4096] * 3
    assert not len(plan.rows)


def test_blocks_out_of_order_pass_through_the_ring_in_one_copy() -> None:
    plan = plan_chunks(layers(3, 1024), [5], [8, 3, 10, 11])
    assert not len(plain(plan))
    assert plan.packed.nbytes.tolist() == [3 * 4096]


def test_each_chunk_goes_its_own_way() -> None:
    plan = plan_chunks(layers(2, 1024), [0, 1, 2], [0, 1, 2, 3, 9, 7, 6, 5, 20, 21, 22, 23])
    assert plain(plan).nbytes.tolist() == [4096] * 4
    assert plan.packed.nbytes.tolist() == [8192]


def test_all_layers_side_by_side_join_across_chunks_but_not_across_extents() -> None:
    layout = ChunkLayout((Run(0, 4096, 4096),), 4, 64)
    sizes = {"direct": 1, "extent": 4 * layout.chunk_bytes}
    blocks = list(range(16))
    assert len(plain(plan_chunks(layout, [0, 1, 2, 3], blocks, **sizes))) == 1
    assert len(plain(plan_chunks(layout, [2, 3, 4, 5], blocks, **sizes))) == 2
    assert len(plain(plan_chunks(layout, [0, 1, 3, 2], blocks, **sizes))) == 3


def test_small_chunks_share_a_ring_slot_and_large_ones_take_several() -> None:
    blocks = [3, 1, 9, 7, 20, 40, 11, 8]
    assert len(plan_chunks(layers(2, 64), [0, 1], blocks).rows) == 1
    large = plan_chunks(layers(3, 1024), [0, 1], blocks, slot=4096)
    assert large.packed.nbytes.tolist() == [4096] * 6
    halves = plan_chunks(layers(3, 1024), [0, 1], blocks, slot=2048)
    assert [len(batch.blocks) for batch in halves.batches()] == [2] * 12


def test_pages_larger_than_a_ring_slot_need_none() -> None:
    plan = plan_chunks(layers(2, 1024), [0], [4, 2, 1, 0], slot=512, direct=1 << 20)
    assert plain(plan).nbytes.tolist() == [1024] * 8


@pytest.mark.parametrize(
    ("chunks", "blocks", "skip"),
    [
        ([0], [64], 0),
        ([0], [-1], 0),
        ([-1], [1], 0),
        ([1 << 40], [1], 0),
        ([0], [0, 1, 2, 3, 4], 0),
        ([0], [0, 1, 2, 3], 1),
        ([0], [0], 4),
        ([0], [0], -1),
    ],
)
def test_nothing_is_planned_out_of_bounds(chunks: list[int], blocks: list[int], skip: int) -> None:
    planner = Planner(layers(2, 64), slot_bytes=1 << 20, direct_bytes=4096)
    with pytest.raises(IndexError):
        planner.plan(
            np.array(chunks) * 512,
            np.array(blocks),
            skip=skip,
            arena_bytes=1 << 20,
            extent_bytes=1 << 20,
        )


def test_nothing_to_do_is_an_empty_plan() -> None:
    planner = Planner(layers(2, 64), slot_bytes=1 << 20, direct_bytes=4096)
    none = np.empty(0, np.int64)
    for chunks in (none, np.array([0])):
        plan = planner.plan(chunks, none, skip=0, arena_bytes=1 << 20, extent_bytes=1 << 20)
        assert not len(plain(plan))
        assert not list(plan.batches())
