"""The engine never fails, and never answers wrongly, because of its cache.

One engine in float32, where a cold run of vLLM alone is the reference for tokens, and a shard in
this process that does as it is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import lmkv_ray.vllm.connector
from lmkv_ray.arena import ArenaReader
from lmkv_ray.messages import MissReason, StageReply
from lmkv_ray.transfer.host_copier import HostCopier
from lmkv_ray.vllm.stats import MISSED, LmkvStats
from tests.vllm.conftest import wait_attached, wait_for
from tests.vllm.engine import VOCABULARY, Engine, EngineProcess
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

STAGE_SECONDS = 0.5
CHUNK = 32


def tokens(seed: int, n: int) -> list[int]:
    made: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, n).tolist()
    return made


@pytest.fixture(scope="module")
def shard() -> Iterator[LocalShard]:
    """Small: about 250 chunks."""
    made = LocalShard(16 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(float32_model: str) -> Iterator[EngineProcess]:
    engine = EngineProcess(float32_model, num_gpu_blocks_override=120)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine(float32_model: str, shard: LocalShard) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmkv_ray.vllm.connector, "RayShardClient", lambda *_, **__: shard)
        made = Engine(
            float32_model,
            connector={"stage_seconds": STAGE_SECONDS, "stage_min_tokens": 64},
            num_gpu_blocks_override=120,
            max_num_batched_tokens=1024,
        )
        wait_attached(made)
        yield made
        made.close()


@pytest.fixture(autouse=True)
def quiet_shard(engine: Engine, shard: LocalShard) -> Iterator[None]:
    engine.reset()
    shard.evict_all()
    yield
    shard.frozen.clear()
    shard.peers, shard.stage_reply = 0, None
    wait_for(lambda: engine.connector()._link.peers == 0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the engine counts during the test."""
    seen: dict[str, float] = {}
    add = LmkvStats.add

    def record(stats: LmkvStats, name: str, value: float) -> None:
        seen[name] = seen.get(name, 0) + value
        add(stats, name, value)

    monkeypatch.setattr(LmkvStats, "add", record)
    return seen


def save(engine: Engine, prompt: list[int]) -> None:
    """Let the engine read a prompt, wait until it is saved, and empty the device's cache."""
    wait_for(lambda: len(engine.connector()._link.slots) >= len(prompt) // CHUNK)
    engine.generate([prompt], max_tokens=1)
    engine.wait_saved()
    assert engine.reset()


def test_chunks_replaced_while_they_are_copied_are_recomputed(
    engine: Engine,
    alone: EngineProcess,
    shard: LocalShard,
    monkeypatch: pytest.MonkeyPatch,
    counted: dict[str, float],
) -> None:
    prompt = tokens(1, 300)
    save(engine, prompt)
    load = HostCopier.load

    def lose_and_load(copier: HostCopier, places: Any) -> None:
        shard.evict_all()
        for chunk in places.chunks:
            copier._arena[chunk : chunk + 4096] = 0xEE
        load(copier, places)

    monkeypatch.setattr(HostCopier, "load", lose_and_load)
    [answer] = engine.generate([prompt])
    assert counted["failed_loads"] == 1
    assert answer.tokens == alone.call("generate", [prompt])[0].tokens


def test_a_load_that_fails_half_way_keeps_its_good_half(
    engine: Engine, alone: EngineProcess, shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(2, 10 * CHUNK + 5)
    save(engine, prompt)
    unchanged = ArenaReader.unchanged

    def all_but_the_fourth(reader: ArenaReader, slots: Any, generations: Any) -> Any:
        good = unchanged(reader, slots, generations)
        good[3] = False
        return good

    monkeypatch.setattr(ArenaReader, "unchanged", all_but_the_fourth)
    [answer] = engine.generate([prompt])
    assert answer.tokens == alone.call("generate", [prompt])[0].tokens
    assert engine.connector()._scheduler._tracked == {}


def test_a_copy_that_raises_is_recomputed(
    engine: Engine, alone: EngineProcess, shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(3, 300)
    save(engine, prompt)

    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(HostCopier, "load", broken)
        patch.setattr(HostCopier, "save", broken)
        [answer] = engine.generate([prompt])
    assert answer.tokens == alone.call("generate", [prompt])[0].tokens
    wait_for(lambda: not engine.connector()._scheduler.saving)


def test_errors_of_the_cache_do_not_reach_the_engine(
    engine: Engine, alone: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(60, 300)
    save(engine, prompt)

    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(ArenaReader, "lookup", broken)
        patch.setattr(ArenaReader, "reasons", broken)
        [answer] = engine.generate([prompt])
    assert answer.cached == 0
    assert answer.tokens == alone.call("generate", [prompt])[0].tokens
    assert engine.reset()
    assert engine.generate([prompt])[0].cached == 288, "it goes on when the error is gone"


def test_a_frozen_shard_costs_nothing_but_its_chunks(
    engine: Engine, alone: EngineProcess, shard: LocalShard
) -> None:
    known, new = tokens(4, 300), tokens(5, 300)
    save(engine, known)
    shard.frozen.set()
    began = time.monotonic()
    [hit] = engine.generate([known])
    assert hit.cached == 288, "local hits go on"
    [miss] = engine.generate([new])
    assert time.monotonic() - began < 5
    assert hit.tokens == alone.call("generate", [known])[0].tokens
    assert miss.tokens == alone.call("generate", [new])[0].tokens


def test_staging_that_never_ends_costs_its_deadline(
    engine: Engine, alone: EngineProcess, shard: LocalShard
) -> None:
    shard.peers = 1
    wait_for(lambda: engine.connector()._link.peers == 1)
    shard.frozen.set()
    prompt = tokens(6, 300)
    began = time.monotonic()
    [answer] = engine.generate([prompt])
    taken = time.monotonic() - began
    assert STAGE_SECONDS <= taken < STAGE_SECONDS + 3
    assert answer.tokens == alone.call("generate", [prompt])[0].tokens
    # A short prompt does not ask at all.
    began = time.monotonic()
    engine.generate([tokens(7, 40)], max_tokens=1)
    assert time.monotonic() - began < STAGE_SECONDS


def test_staging_that_fails_is_a_miss_with_its_reason(
    engine: Engine, alone: EngineProcess, shard: LocalShard, counted: dict[str, float]
) -> None:
    shard.peers = 1
    shard.stage_reply = StageReply(ready=0, reason=MissReason.FETCH_FAILED)
    wait_for(lambda: engine.connector()._link.peers == 1)
    prompt = tokens(8, 300)
    [answer] = engine.generate([prompt], max_tokens=2)
    assert answer.tokens == alone.call("generate", [prompt], max_tokens=2)[0].tokens
    assert counted[MISSED + "fetch_failed"] == 288


def test_every_missed_token_has_a_reason(
    engine: Engine, shard: LocalShard, counted: dict[str, float]
) -> None:
    evicted, fresh = tokens(9, 100), tokens(10, 70)
    save(engine, evicted)
    shard.evict_all()
    counted.clear()
    engine.generate([evicted], max_tokens=1)
    engine.generate([fresh], max_tokens=1)
    engine.wait_saved()
    engine.reset()
    engine.generate([evicted], max_tokens=1)
    missed = {k.removeprefix(MISSED): v for k, v in counted.items() if k.startswith(MISSED)}
    assert missed == {"evicted": 96, "never_stored": 64, "tail": 4 + 6 + 4}
    assert counted["hit_tokens"] == 96


def test_reset_forgets_everything_at_once(engine: Engine) -> None:
    prompt = tokens(11, 200)
    save(engine, prompt)
    assert engine.reset(connector=True)
    [answer] = engine.generate([prompt], max_tokens=1)
    assert answer.cached == 0, "a cleared chunk was served"
    wait_for(lambda: not engine.connector()._link.clearing)
    # And the cache works again.
    engine.reset()
    fresh = tokens(12, 200)
    save(engine, fresh)
    assert engine.generate([fresh], max_tokens=1)[0].cached == 192


def test_aborts_preemptions_and_concurrency_leave_nothing_behind(
    engine: Engine, alone: EngineProcess, shard: LocalShard
) -> None:
    """More requests than the device's cache holds, many of them aborted, in every state."""
    from vllm import SamplingParams

    llm_engine, core = engine.llm().llm_engine, engine.core()
    rng = np.random.default_rng(0)
    common = tokens(20, 400)
    prompts = {
        f"r{i}": common[: int(rng.integers(0, 400))] + tokens(30 + i, int(rng.integers(1, 900)))
        for i in range(24)
    }
    finished: dict[str, tuple[int, ...]] = {}
    doomed = {name for name in prompts if rng.random() < 0.4}
    waiting = list(prompts)
    params = SamplingParams(max_tokens=40, temperature=0, detokenize=False, ignore_eos=True)
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
            finished.pop(name, None)
    engine.drain()
    for name, answer in finished.items():
        if len(answer) == 40:
            assert answer == alone.call("generate", [prompts[name]], max_tokens=40)[0].tokens, name
    assert engine.connector()._scheduler._tracked == {}
    assert not engine.connector()._scheduler.saving
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "pinned blocks were lost"
    assert threading.active_count() < 40


def test_a_full_arena_keeps_serving(engine: Engine, shard: LocalShard) -> None:
    """Three times what the arena holds passes through it; the latest is always a hit."""
    before = shard.state.counters.evicted
    capacity = shard.writer.geometry.capacity // engine.connector()._scheduler._shape.nbytes[0]
    for seed in range(3 * capacity // 28 + 1):
        prompt = tokens(1000 + seed, 900)
        save(engine, prompt)
        assert engine.generate([prompt], max_tokens=1)[0].cached == 896
        assert engine.reset()
    assert shard.state.counters.evicted - before > capacity
