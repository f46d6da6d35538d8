"""A hit through our cache equals one in vLLM's own prefix cache: tokens and logprobs, to the bit.

Two engines answer the same requests: one with the connector, whose device cache is emptied before
the hit, and vLLM alone, which hits its own prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lmkv_ray.vllm.connector
from tests.vllm.conftest import wait_attached, wait_for
from tests.vllm.engine import VOCABULARY, Engine, EngineProcess
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

EXPENSIVE = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # an example takes a second: do not shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

CONFIGURATIONS = {
    "block 32, chunk 32": ({}, {}, 32),
    "block 32, chunk 96": ({}, {"chunk_tokens": 80}, 96),
    "block 64, chunk 64, sha256_cbor": (
        {"block_size": 64, "prefix_caching_hash_algo": "sha256_cbor"},
        {},
        64,
    ),
    "block 128, chunk 256, small steps": (
        {"block_size": 128, "max_num_batched_tokens": 160},
        {"chunk_tokens": 256},
        256,
    ),
}


def tokens(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, n).tolist()


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def engines(
    request: pytest.FixtureRequest,
    bfloat16_model: str,
    shard: LocalShard,
) -> Iterator[tuple[Engine, EngineProcess, int]]:
    options, connector, chunk_tokens = CONFIGURATIONS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmkv_ray.vllm.connector, "RayShardClient", lambda *_, **__: shard)
        alone = EngineProcess(bfloat16_model, **options)
        engine = Engine(bfloat16_model, connector=connector, **options)
        wait_attached(engine)
        yield engine, alone, chunk_tokens
        engine.close()
        alone.close()


def save_prompt(engine: Engine, shard: LocalShard, prompt: list[int], chunk_tokens: int) -> None:
    """Let an engine read a prompt, and wait until its chunks are ready."""
    expected = len(shard.state.chunks) + (len(prompt) // chunk_tokens)
    engine.generate([prompt], max_tokens=1)
    wait_for(lambda: len(shard.state.chunks) >= expected)


@settings(EXPENSIVE, max_examples=12)
@given(
    seed=st.integers(0, 1 << 30),
    shared_chunks=st.integers(0, 6),
    shared_rest=st.integers(0, 31),
    suffix=st.integers(1, 300),
)
def test_one_request_equal_to_the_bit(
    engines: tuple[Engine, EngineProcess, int],
    shard: LocalShard,
    seed: int,
    shared_chunks: int,
    shared_rest: int,
    suffix: int,
) -> None:
    engine, alone, chunk_tokens = engines
    first = tokens(seed, shared_chunks * chunk_tokens + shared_rest + 1)
    second = first[:-1] + tokens(seed + 1, suffix)
    assert engine.reset()
    alone.call("reset")
    shard.evict_all()
    alone.call("generate", [first], max_tokens=1)
    save_prompt(engine, shard, first, chunk_tokens)
    assert engine.reset(), "blocks are still pinned"
    [expected] = alone.call("generate", [second])
    [answer] = engine.generate([second])
    assert answer.cached == expected.cached
    assert answer == expected


@settings(EXPENSIVE, max_examples=6)
@given(
    seed=st.integers(0, 1 << 30),
    lengths=st.lists(st.integers(2, 700), min_size=2, max_size=5),
    shared=st.integers(0, 600),
)
def test_many_requests_at_once_want_and_save_the_same_chunks(
    engines: tuple[Engine, EngineProcess, int],
    shard: LocalShard,
    seed: int,
    lengths: list[int],
    shared: int,
) -> None:
    """Concurrent requests: each gets its own tokens; batching decides the last bits of logprobs."""
    engine, _, chunk_tokens = engines
    common = tokens(seed, shared)
    prompts = [(common + tokens(seed + i, n))[:1900] for i, n in enumerate(lengths)]
    assert engine.reset()
    shard.evict_all()
    cold = [engine.generate([prompt])[0] for prompt in prompts]
    chunks = {
        tuple(p[: c * chunk_tokens]) for p in prompts for c in range(1, 1 + len(p) // chunk_tokens)
    }
    wait_for(lambda: len(shard.state.chunks) >= len(chunks))
    assert engine.reset()
    hits = engine.generate([*prompts, *prompts])
    for answer, expected in zip(hits, [*cold, *cold], strict=True):
        assert (
            answer.cached >= (len(prompts[cold.index(expected)]) - 1) // chunk_tokens * chunk_tokens
        )
        assert np.allclose(answer.logprobs[0], expected.logprobs[0], atol=0.25)
