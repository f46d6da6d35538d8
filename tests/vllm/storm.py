"""More requests than the device's cache holds; they come, and are aborted, at random moments."""

from __future__ import annotations

import numpy as np

from tests.vllm.conftest import tokens
from tests.vllm.engine import Engine


def storm(
    engine: Engine, requests: int, max_tokens: int
) -> list[tuple[list[int], tuple[int, ...]]]:
    """Let it pass.

    Returns:
        prompt and answer of each request that was not aborted.
    """
    from vllm import SamplingParams

    llm_engine = engine.llm().llm_engine
    rng = np.random.default_rng(0)
    common = tokens(20, 400)
    prompts = {
        f"r{i}": common[: int(rng.integers(0, 400))] + tokens(30 + i, int(rng.integers(1, 900)))
        for i in range(requests)
    }
    finished: dict[str, tuple[int, ...]] = {}
    doomed = {name for name in prompts if rng.random() < 0.4}
    waiting = list(prompts)
    params = SamplingParams(max_tokens=max_tokens, temperature=0, detokenize=False, ignore_eos=True)
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
    whole = [(prompts[name], value) for name, value in finished.items() if len(value) == max_tokens]
    assert len(whole) >= requests // 3
    return whole


def assert_nothing_is_held(engine: Engine) -> None:
    """No request is remembered, no save under way, no block held."""
    scheduler = engine.connector()._scheduler
    assert scheduler._tracked == {}
    assert not scheduler.saving
    pool = engine.core().scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "held blocks were lost"


def preemptions(engine: Engine) -> float:
    """Requests that made room for others, ever."""
    metrics = engine.llm().get_metrics()
    return float(sum(value.value for value in metrics if value.name == "vllm:num_preemptions"))
