"""Which chunks a hit needs, against vLLM's managers and a reference that goes block by block."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.vllm.engine.groups import Group, derive_groups, hit_alignment, longest_hit

HASH = 4


@st.composite
def some_groups(draw: st.DrawFn) -> list[Group]:
    """One to three groups with their own block sizes, chunk sizes and reach."""
    groups = []
    for number in range(draw(st.integers(1, 3))):
        size = HASH * draw(st.sampled_from([1, 2, 3]))
        kind = draw(st.sampled_from(["full", "window", "local"]))
        groups.append(
            Group(
                number,
                block_tokens=size,
                blocks=draw(st.integers(1, 4)),
                hash_tokens=HASH,
                window=draw(st.integers(1, 60)) if kind == "window" else None,
                local=draw(st.integers(1, 60)) if kind == "local" else None,
            )
        )
    return groups


def needed_blocks(group: Group, computed: int, end: int) -> list[int]:
    """Token by token: blocks beyond ``computed`` with a token that the next token looks at."""
    looked_at = range(end)
    if group.window is not None:
        looked_at = range(max(0, end - group.window + 1), end)
    if group.local is not None:
        looked_at = range(end // group.local * group.local, end)
    # A block half of whose tokens are seen is needed whole; the engine has those before computed.
    return sorted({t // group.block_tokens for t in looked_at if t >= computed})


def reference(
    groups: list[Group], found: list[np.ndarray], computed: int, limit: int, align: int
) -> int:
    for end in range(limit // align * align, computed, -align):
        if all(
            held[block // group.blocks - computed // group.tokens]
            for group, held in zip(groups, found, strict=True)
            for block in needed_blocks(group, computed, end)
        ):
            return end
    return computed


@given(some_groups(), st.data())
def test_the_longest_hit_is_the_one_found_block_by_block(
    groups: list[Group], data: st.DataObject
) -> None:
    align = hit_alignment(groups)
    computed = align * data.draw(st.integers(0, 6), "computed")
    limit = computed + data.draw(st.integers(1, 200), "limit")
    chance = data.draw(st.sampled_from([0.5, 0.9, 0.99, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    found = [
        rng.random(-(-limit // group.tokens) - computed // group.tokens) < chance
        for group in groups
    ]
    hit = longest_hit(groups, found, computed=computed, limit=limit, align=align)
    assert hit == reference(groups, found, computed, limit, align)


@given(some_groups(), st.integers(0, 9), st.integers(1, 40))
def test_what_is_loaded_is_what_is_needed(groups: list[Group], before: int, more: int) -> None:
    align = hit_alignment(groups)
    computed, end = before * align, (before + more) * align
    for group in groups:
        blocks = range(group.first_block(computed, end), end // group.block_tokens)
        assert list(blocks) == needed_blocks(group, computed, end)
        chunks = {block // group.blocks for block in blocks}
        assert list(group.span(computed, end)) == sorted(chunks)


@given(st.sampled_from([16, 32, 48]), st.integers(2, 400), st.integers(1, 300))
def test_a_windowed_chunk_is_complete_while_the_engine_holds_it(
    size: int, window: int, chunk_tokens: int
) -> None:
    """Else nothing of what is generated token by token could ever be saved."""
    [group] = derive_groups(cache(sliding(size, window)), chunk_tokens)
    end = 10 * group.tokens
    computed = end - 1  # of the step before the one that completes the chunk
    freed = max(0, computed - window + 1) // size
    assert freed <= end // size - group.blocks


def test_hashes_of_chunks_are_those_of_their_last_tokens() -> None:
    group = Group(0, block_tokens=32, blocks=3, hash_tokens=16)
    assert [group.hash_index(i) for i in range(3)] == [5, 11, 17]


class FullAttentionSpec(SimpleNamespace): ...


class SlidingWindowSpec(SimpleNamespace): ...


class ChunkedLocalAttentionSpec(SimpleNamespace): ...


def sliding(size: int, window: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=size, sliding_window=window)


def cache(*specs: SimpleNamespace, hash_block_size: int | None = None) -> SimpleNamespace:
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return SimpleNamespace(kv_cache_groups=groups, hash_block_size=hash_block_size)


def test_groups_are_derived_from_the_engines() -> None:
    full = FullAttentionSpec(block_size=32, sliding_window=100)
    local = ChunkedLocalAttentionSpec(block_size=32, attention_chunk_size=192)
    config = cache(full, sliding(16, 100), local, hash_block_size=16)
    assert derive_groups(config, 256) == (
        Group(0, 32, 8, 16),
        Group(1, 16, 6, 16, window=100),
        Group(2, 32, 2, 16, local=192),
    )
    assert [group.blocks for group in derive_groups(config, 1)] == [1, 1, 1]


@pytest.mark.vllm
@given(st.integers(1, 100), st.integers(0, 400))
def test_the_reach_is_that_of_vllms_managers(reach: int, computed: int) -> None:
    from vllm.v1.core.single_type_kv_cache_manager import (
        ChunkedLocalAttentionManager,
        FullAttentionManager,
        SlidingWindowManager,
    )

    full = object.__new__(FullAttentionManager)
    assert Group(0, 1, 1, 1).first_block(0, computed) == full.get_num_skipped_tokens(computed)
    window = object.__new__(SlidingWindowManager)
    window.sliding_window, window.extra_retained_tokens = reach, 0
    group = Group(0, 1, 1, 1, window=reach)
    assert group.first_block(0, computed) == window.get_num_skipped_tokens(computed)
    local = object.__new__(ChunkedLocalAttentionManager)
    local.attention_chunk_size = reach
    group = Group(0, 1, 1, 1, local=reach)
    assert group.first_block(0, computed) == local.get_num_skipped_tokens(computed)
