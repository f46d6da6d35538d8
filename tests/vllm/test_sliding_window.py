"""A model with two KV groups, one of which keeps a window only.

Every hit is compared with vLLM's own prefix cache in the same engine: tokens and logprobs, to the
bit. float32, so that the rest compares by tokens whatever is batched with whatever.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkv_ray.vllm.connector
from lmkv_ray.transfer import Ended, HostEngine, Load
from lmkv_ray.vllm.groups import Group
from lmkv_ray.vllm.link import GrantedSlot
from lmkv_ray.vllm.requests import TrackedRequest
from lmkv_ray.vllm.saves import Saver
from tests.vllm.conftest import EXPENSIVE, own_hit_and_ours, save_prompt, tokens, wait_attached
from tests.vllm.engine import Engine
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

BLOCK, CHUNK, WINDOW = 32, 64, 100
SLIDING, FULL = 0, 1
"""The groups, in vLLM's order."""


@pytest.fixture(scope="module")
def engine(sliding_model: str, shard: LocalShard) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmkv_ray.vllm.connector, "RayShardClient", lambda *_, **__: shard)
        made = Engine(
            sliding_model,
            connector={"chunk_tokens": CHUNK},
            num_gpu_blocks_override=150,
            max_num_batched_tokens=1024,
        )
        wait_attached(made)
        yield made
        made.close()


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[bytes]]:
    """Keys of the chunks whose save is ordered during the test, per group, in order."""
    keys: dict[int, list[bytes]] = {SLIDING: [], FULL: []}
    order = Saver._order

    def record(
        saver: Saver,
        tracked: TrackedRequest,
        group: Group,
        chunk: int,
        granted: GrantedSlot,
        blocks: list[int],
    ) -> None:
        keys[group.number].append(tracked.keys(group)[chunk].tobytes())
        order(saver, tracked, group, chunk, granted, blocks)

    monkeypatch.setattr(Saver, "_order", record)
    return keys


def test_the_groups_are_what_this_file_says(engine: Engine) -> None:
    groups = engine.connector()._groups
    assert [group.window for group in groups] == [WINDOW, None]
    assert [group.tokens for group in groups] == [CHUNK, CHUNK]


@settings(EXPENSIVE, max_examples=20)
@given(
    seed=st.integers(0, 1 << 30),
    chunks=st.integers(0, 14),
    rest=st.integers(0, BLOCK - 1),
    suffix=st.integers(1, 200),
)
def test_hits_that_end_anywhere_are_vllms_own(
    engine: Engine, shard: LocalShard, seed: int, chunks: int, rest: int, suffix: int
) -> None:
    first = tokens(seed, chunks * CHUNK + rest + 1)
    second = first[:-1] + tokens(seed + 1, suffix)
    own, ours = own_hit_and_ours(engine, shard, first, second)
    assert ours.cached == chunks * CHUNK
    assert ours.tokens == own.tokens
    # On a busy machine vLLM's own hit was once seen to be shorter: then it is another computation.
    assert own.cached <= ours.cached
    if own.cached == ours.cached:
        assert ours == own


def test_a_prompt_that_ends_with_a_chunk_leaves_one_block(
    engine: Engine, shard: LocalShard
) -> None:
    prompt = tokens(1, 6 * CHUNK)
    own, ours = own_hit_and_ours(engine, shard, prompt, prompt)
    assert ours == own
    assert ours.cached == 6 * CHUNK - BLOCK


def test_generated_tokens_are_saved_in_both_groups(
    engine: Engine, saved: dict[int, list[bytes]]
) -> None:
    """They come one by one, and the window moves on meanwhile."""
    prompt = tokens(2, 5)
    [answer] = engine.generate([prompt], max_tokens=4 * CHUNK)
    engine.wait_saved()
    assert [len(keys) for keys in saved.values()] == [4, 4]
    assert engine.reset()
    [again] = engine.generate([prompt + list(answer.tokens)], max_tokens=1)
    assert again.cached == 4 * CHUNK


@pytest.mark.parametrize(
    ("group", "evicted", "cached"),
    [
        (SLIDING, range(5), 8 * CHUNK),  # behind the window: nobody needs them
        (SLIDING, [7], 7 * CHUNK),  # the window before it is whole
        (SLIDING, [5, 7], 5 * CHUNK),  # 6 alone is less than a window
        (SLIDING, [6], 6 * CHUNK),
        (SLIDING, range(8), 0),
        (FULL, [0], 0),
        (FULL, [5], 5 * CHUNK),
        (FULL, [7], 7 * CHUNK),
    ],
)
def test_chunks_of_one_group_are_evicted(
    engine: Engine,
    shard: LocalShard,
    saved: dict[int, list[bytes]],
    group: int,
    evicted: range | list[int],
    cached: int,
) -> None:
    prompt = tokens(3, 8 * CHUNK + 9)
    own = start_anew(engine, shard, prompt)
    shard.evict([saved[group][i] for i in evicted])
    [ours] = engine.generate([prompt])
    assert ours.cached == cached
    assert ours.tokens == own


@pytest.mark.parametrize("group", [SLIDING, FULL])
def test_a_load_that_fails_in_one_group_is_recomputed(
    engine: Engine, shard: LocalShard, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    prompt = tokens(4, 8 * CHUNK + 9)
    own = start_anew(engine, shard, prompt)
    load, failed = HostEngine._load, []

    def fail_once(host: HostEngine, copy: Load) -> Ended:
        if copy.group == group and not failed:
            failed.append(copy)
            return Ended(copy, False, 0)
        return load(host, copy)

    monkeypatch.setattr(HostEngine, "_load", fail_once)
    [ours] = engine.generate([prompt])
    assert failed
    assert ours.tokens == own
    assert ours.cached <= len(prompt) - len(failed[0].blocks) * BLOCK, "it was claimed again"
    assert engine.connector()._scheduler._tracked == {}


def test_an_order_to_load_that_is_lost_is_a_failed_load(
    engine: Engine, shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(5, 4 * CHUNK + 9)
    own = start_anew(engine, shard, prompt)

    def broken(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr("lmkv_ray.vllm.hits._order", broken)
    [ours] = engine.generate([prompt])
    assert ours.tokens == own
    assert ours.cached == 0


def test_aborts_preemptions_and_concurrency_leave_nothing_behind(
    engine: Engine, shard: LocalShard
) -> None:
    """More requests than the device's cache holds, many of them aborted, in every state."""
    from vllm import SamplingParams

    llm_engine, core = engine.llm().llm_engine, engine.core()
    rng = np.random.default_rng(0)
    common = tokens(20, 400)
    prompts = {
        f"r{i}": common[: int(rng.integers(0, 400))] + tokens(30 + i, int(rng.integers(1, 900)))
        for i in range(16)
    }
    engine.reset()
    shard.evict_all()
    cold = {name: engine.generate([prompt], 30)[0].tokens for name, prompt in prompts.items()}
    assert engine.reset()
    finished: dict[str, tuple[int, ...]] = {}
    doomed = {name for name in prompts if rng.random() < 0.4}
    waiting = list(prompts)
    params = SamplingParams(max_tokens=30, temperature=0, detokenize=False, ignore_eos=True)
    while waiting or llm_engine.has_unfinished_requests():
        if waiting and rng.random() < 0.5:
            name = waiting.pop()
            llm_engine.add_request(name, {"prompt_token_ids": prompts[name]}, params)
        for output in llm_engine.step():
            if output.finished:
                finished[output.request_id] = tuple(output.outputs[0].token_ids)
        for name in [n for n in doomed if n not in waiting and rng.random() < 0.2]:
            llm_engine.abort_request([name])
            doomed.discard(name)
    engine.drain()
    whole = {name: answer for name, answer in finished.items() if len(answer) == 30}
    assert len(whole) >= 5
    assert all(answer == cold[name] for name, answer in whole.items())
    assert engine.connector()._scheduler._tracked == {}
    assert not engine.connector()._scheduler.saving
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "pinned blocks were lost"


def start_anew(engine: Engine, shard: LocalShard, prompt: list[int]) -> tuple[int, ...]:
    """A cold answer's tokens; then the prompt's chunks are in the shard and nowhere else."""
    engine.reset()
    shard.evict_all()
    [cold] = engine.generate([prompt])
    engine.reset()
    shard.evict_all()
    save_prompt(engine, prompt)
    return cold.tokens
