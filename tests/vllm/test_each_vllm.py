"""What must hold on each version of vLLM that we claim, and on both of its model runners.

``make test-vllm`` runs this, beside ``make test``, with other versions and with the other runner.
One engine in float32, where what is computed is the same whichever way a prompt was cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lmkv_ray.arena import ArenaReader
from lmkv_ray.messages import MissReason
from lmkv_ray.vllm.scheduler.half import SchedulerHalf
from tests.vllm import model_runner_v2
from tests.vllm.conftest import (
    engine_on,
    forget,
    own_hit_and_ours,
    save_prompt,
    tokens,
    wait_for,
    wait_for_slots,
)
from tests.vllm.engine import Answer, Engine
from tests.vllm.local_shard import LocalShard
from tests.vllm.storm import assert_nothing_is_held, preemptions, storm

pytestmark = [pytest.mark.vllm, pytest.mark.each_vllm]

CHUNK = 32
STEP = 128
"""Tokens of a step: a prompt takes several."""


@pytest.fixture(scope="module")
def engine(float32_model: str, shard: LocalShard) -> Iterator[Engine]:
    with engine_on(
        shard,
        float32_model,
        connector={"stage_min_tokens": CHUNK},
        num_gpu_blocks_override=66,
        max_num_batched_tokens=STEP,
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def empty(engine: Engine, shard: LocalShard) -> None:
    forget(engine, shard)


def cold(engine: Engine, shard: LocalShard, prompt: list[int], **asked: Any) -> Answer:
    """An answer for which everything was computed."""
    forget(engine, shard)
    [answer] = engine.generate([prompt], **asked)
    assert answer.cached == 0
    return answer


def test_the_model_runner_is_the_one_that_was_asked_for(engine: Engine) -> None:
    """Of 2, the default on GPUs, which also schedules asynchronously (``model_runner_v2``)."""
    core = engine.core()
    runner = core.model_executor.driver_worker.worker.model_runner
    kinds = {base.__module__.removeprefix("vllm.v1.worker.") for base in type(runner).__mro__}
    assert ("gpu.model_runner" in kinds) == model_runner_v2.wanted(), kinds
    assert core.vllm_config.scheduler_config.async_scheduling == model_runner_v2.wanted()
    assert (core.batch_queue is not None) == model_runner_v2.wanted()


def test_a_hit_is_vllms_own_hit_to_the_bit(engine: Engine, shard: LocalShard) -> None:
    prompt = tokens(1, 300)
    for second in (prompt, [*prompt, *tokens(2, 200)], prompt[:160], [*prompt[:100], *prompt]):
        own, ours = own_hit_and_ours(engine, shard, prompt, second)
        assert own.cached == ours.cached > 0
        assert (own.tokens, own.logprobs) == (ours.tokens, ours.logprobs)


def test_chunks_are_saved_while_their_request_runs(engine: Engine, shard: LocalShard) -> None:
    from vllm import SamplingParams

    prompt = tokens(3, 300)
    wait_for_slots(engine, [tokens(3, 300 + 2 * CHUNK)])
    steps = engine.llm().llm_engine
    params = SamplingParams(max_tokens=200, temperature=0, detokenize=False, ignore_eos=True)
    steps.add_request("long", {"prompt_token_ids": prompt}, params)
    made: list[Any] = []
    while not made or len(made[-1].outputs[0].token_ids) < 2 * CHUNK:
        made += steps.step()
    wait_for(lambda: len(shard.state.chunks) >= (len(prompt) + CHUNK) // CHUNK)
    steps.abort_request(["long"])
    engine.drain()
    assert_nothing_is_held(engine)


def test_what_a_request_leaves_is_saved_when_it_ends(
    engine: Engine, shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(4, 300)
    wait_for_slots(engine, [prompt])
    with monkeypatch.context() as patch:
        patch.setattr(SchedulerHalf, "_plan_saves", lambda *_: None)
        engine.generate([prompt], max_tokens=1)
    assert_nothing_is_held(engine)
    engine.wait_saved()
    assert engine.reset(), "blocks are still held"
    assert engine.generate([prompt])[0].cached == 288


def test_a_load_that_fails_is_recomputed(
    engine: Engine, shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(5, 300)
    expected = cold(engine, shard, prompt)
    shard.evict_all()
    engine.reset()
    save_prompt(engine, prompt)
    unchanged = ArenaReader.unchanged

    def all_but_the_fourth(reader: ArenaReader, slots: Any, generations: Any) -> Any:
        good = unchanged(reader, slots, generations)
        good[3] = False
        return good

    before = engine.counted().get("failed_loads", 0)
    with monkeypatch.context() as patch:
        patch.setattr(ArenaReader, "unchanged", all_but_the_fourth)
        [answer] = engine.generate([prompt])
    assert engine.counted()["failed_loads"] > before
    assert answer.tokens == expected.tokens
    assert_nothing_is_held(engine)


def test_log_probabilities_of_a_prompt_are_computed(engine: Engine, shard: LocalShard) -> None:
    prompt = tokens(6, 300)
    expected = cold(engine, shard, prompt, prompt_logprobs=1)
    assert len(expected.prompt) == len(prompt) - 1
    forget(engine, shard)
    save_prompt(engine, prompt)
    shard.peers, stages = 1, shard.stages
    wait_for(lambda: engine.connector()._link.peers == 1)
    before = engine.counted().get(MissReason.NOT_READ, 0)
    try:
        [answer] = engine.generate([prompt], prompt_logprobs=1)
    finally:
        shard.peers = 0
        wait_for(lambda: engine.connector()._link.peers == 0)
    assert answer == expected
    assert engine.counted()[MissReason.NOT_READ] == before + 288
    assert shard.stages == stages, "what may not be used was asked for"


def test_aborts_and_preemptions_leave_nothing_behind(engine: Engine, shard: LocalShard) -> None:
    before = preemptions(engine)
    whole = storm(engine, 24, 40)
    assert preemptions(engine) > before
    assert_nothing_is_held(engine)
    for prompt, answer in whole[:2]:
        assert answer == cold(engine, shard, prompt, max_tokens=40).tokens
