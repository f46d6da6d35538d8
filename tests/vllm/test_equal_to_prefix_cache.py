"""A hit through our cache equals one in vLLM's own prefix cache: tokens and logprobs, to the bit.

Two engines answer the same requests: one with the connector, whose device cache is emptied before
the hits, and vLLM alone, which hits its own prefix cache. Requests come all at once, so that they
load and save at the same time, but are computed one at a time: what is computed together decides
the last bits (``test_survives`` compares such answers by their tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vllm.conftest import EXPENSIVE, engine_on, save_prompts, tokens
from tests.vllm.engine import Engine, EngineProcess
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

SMALLEST_BLOCK = 32  # of vLLM's attention on CPUs


class Geometry(NamedTuple):
    """Of two engines."""

    block: int
    blocks: int
    """In a chunk."""
    step: int
    """Tokens computed at once, at most."""
    hashes: str

    @property
    def chunk(self) -> int:
        return self.block * self.blocks


class Asked(NamedTuple):
    """A request for a text that begins like another."""

    chunks: int
    rest: int
    """Tokens that are shared: whole chunks, and less than a block."""
    own: int
    """Tokens that are not."""


geometries = st.builds(
    Geometry,
    st.sampled_from([32, 64, 96, 128]),
    st.integers(1, 3),
    st.sampled_from([160, 512, 2048]),
    st.sampled_from(["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"]),
)
requests = st.builds(
    Asked, st.integers(0, 4), st.integers(0, SMALLEST_BLOCK - 1), st.integers(1, 300)
)
rounds = st.tuples(st.integers(0, 1 << 30), st.lists(requests, min_size=1, max_size=5))


@pytest.mark.timeout(600)
@settings(EXPENSIVE, max_examples=6)
@given(geometry=geometries, rounds=st.lists(rounds, min_size=5, max_size=8))
def test_equal_to_the_bit(
    bfloat16_model: str, geometry: Geometry, rounds: list[tuple[int, list[Asked]]]
) -> None:
    with engines(bfloat16_model, geometry) as (engine, alone, shard):
        for seed, asked in rounds:
            text = tokens(seed, 4 * geometry.chunk + SMALLEST_BLOCK)
            first = [[*text[: wish.chunks * geometry.chunk + wish.rest], 7] for wish in asked]
            assert engine.reset()
            alone.call("reset")
            shard.evict_all()
            alone.call("generate", first, max_tokens=1)
            save_prompts(engine, first)
            # Each twice, with another end: the later finds what the first loads, or loads it too.
            second = [
                text[: wish.chunks * geometry.chunk + wish.rest] + tokens(seed + i, wish.own)
                for i, wish in enumerate([*asked, *asked], 1)
            ]
            expected = alone.call("generate", second)
            answers = engine.generate(second)
            assert answers == expected
            hits = [wish.chunks * geometry.chunk for wish in asked]
            assert [wish.cached for wish in answers] == [*hits, *hits]


@contextmanager
def engines(model: str, geometry: Geometry) -> Iterator[tuple[Engine, EngineProcess, LocalShard]]:
    options: dict[str, Any] = {
        "block_size": geometry.block,
        "prefix_caching_hash_algo": geometry.hashes,
        "max_num_batched_tokens": geometry.step,
        "max_num_seqs": 1,
    }
    shard = LocalShard(64 << 20)
    alone = EngineProcess(model, **options)
    try:
        connector = {"chunk_tokens": geometry.chunk}
        with engine_on(shard, model, connector=connector, **options) as engine:
            yield engine, alone, shard
    finally:
        alone.close()
        shard.close()
