"""The engine never fails, and never answers wrongly, because of its cache.

One engine in float32, where a cold run of vLLM alone is the reference for tokens, and a shard in
this process that does as it is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lmkv_ray.arena import ArenaReader
from lmkv_ray.transfer.host_copier import HostCopier
from tests.vllm.conftest import engine_on, forget, save_prompt, save_prompts, tokens, wait_for
from tests.vllm.engine import Engine, EngineProcess
from tests.vllm.local_shard import LocalShard
from tests.vllm.storm import assert_nothing_is_held, preemptions, storm

pytestmark = pytest.mark.vllm

STAGE_SECONDS = 0.5
CHUNK = 32


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
    with engine_on(
        shard,
        float32_model,
        connector={
            "stage_seconds": STAGE_SECONDS,
            "stage_min_tokens": 64,
        },
        num_gpu_blocks_override=120,
        max_num_batched_tokens=1024,
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def quiet_shard(engine: Engine, shard: LocalShard) -> Iterator[None]:
    forget(engine, shard)
    yield
    shard.frozen.clear()
    shard.peers = 0
    wait_for(lambda: engine.connector()._link.peers == 0)


def test_chunks_replaced_while_they_are_copied_are_recomputed(
    engine: Engine,
    alone: EngineProcess,
    shard: LocalShard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = tokens(1, 300)
    save_prompt(engine, prompt)
    load = HostCopier.load

    def lose_and_load(copier: HostCopier, targets: Any) -> None:
        shard.evict_all()
        for chunk in targets.chunks:
            copier._arena[chunk : chunk + 4096] = 0xEE
        load(copier, targets)

    monkeypatch.setattr(HostCopier, "load", lose_and_load)
    before = engine.counted().get("failed_loads", 0)
    [answer] = engine.generate([prompt])
    assert engine.counted()["failed_loads"] == before + 1
    assert answer.tokens == alone.call("generate", [prompt])[0].tokens


def test_a_load_that_fails_half_way_keeps_its_good_half(
    engine: Engine, alone: EngineProcess, shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(2, 10 * CHUNK + 5)
    save_prompt(engine, prompt)
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
    save_prompt(engine, prompt)

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
    save_prompt(engine, prompt)

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
    save_prompt(engine, known)
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


def test_many_requests_at_once_want_and_save_the_same_chunks(
    engine: Engine, alone: EngineProcess
) -> None:
    common = tokens(70, 500)
    prompts = [common[:n] + tokens(71 + n, 40) for n in (100, 300, 400, 500)]
    save_prompts(engine, prompts)
    answers = engine.generate([*prompts, *prompts])
    for prompt, answer in zip([*prompts, *prompts], answers, strict=True):
        assert answer.cached == (len(prompt) - 1) // CHUNK * CHUNK
        assert answer.tokens == alone.call("generate", [prompt])[0].tokens


def test_a_request_finishes_while_it_is_saved(
    engine: Engine, alone: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(80, 300)
    go_on, save = threading.Event(), HostCopier.save

    def wait_and_save(copier: HostCopier, targets: Any) -> None:
        go_on.wait(30)
        save(copier, targets)

    monkeypatch.setattr(HostCopier, "save", wait_and_save)
    try:
        engine.ask(prompt, {}, drain=False)
        assert engine.connector()._scheduler._tracked == {}
        assert engine.connector()._scheduler.saving
        assert not engine.reset(), "blocks are not held"
    finally:
        go_on.set()
    engine.drain()
    engine.wait_saved()
    assert engine.reset()
    [answer] = engine.generate([prompt])
    assert answer.cached == 288
    assert answer.tokens == alone.call("generate", [prompt])[0].tokens


def test_a_prompt_of_one_step_is_saved_whole(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More chunks than may be saved at a time, and one token out."""
    [saver] = engine.connector()._scheduler._savers
    few = saver._settings.model_copy(update={"max_inflight_saves": 8})
    monkeypatch.setattr(saver, "_settings", few)
    prompt = tokens(81, 1000)
    engine.generate([prompt], max_tokens=1)
    engine.wait_saved()
    assert engine.reset(), "blocks are still held"
    [answer] = engine.generate([prompt], max_tokens=1)
    assert answer.cached == 992 // CHUNK * CHUNK


def test_saves_that_wait_make_room_for_requests(engine: Engine, shard: LocalShard) -> None:
    shard.frozen.set()  # no slots come any more
    try:
        dropped = engine.counted()["dropped_chunks"]
        for seed in range(6):  # three of them fill the device
            engine.ask(tokens(810 + seed, 1000), {}, drain=False)
        assert engine.counted()["dropped_chunks"] > dropped
    finally:
        shard.frozen.clear()
    engine.drain()
    engine.wait_attached()
    assert_nothing_is_held(engine)


def test_aborts_preemptions_and_concurrency_leave_nothing_behind(
    engine: Engine, alone: EngineProcess
) -> None:
    before = preemptions(engine)
    whole = storm(engine, 24, 40)
    assert preemptions(engine) > before
    for prompt, answer in whole:
        assert answer == alone.call("generate", [prompt], max_tokens=40)[0].tokens
    assert_nothing_is_held(engine)
    assert threading.active_count() < 40


def test_a_full_arena_keeps_serving(engine: Engine, shard: LocalShard) -> None:
    """Three times what the arena holds passes through it; the latest is always a hit."""
    before = shard.state.counters.evicted
    capacity = shard.writer.geometry.capacity // engine.connector()._scheduler._places[0].nbytes[0]
    for seed in range(3 * capacity // 28 + 1):
        prompt = tokens(1000 + seed, 900)
        save_prompt(engine, prompt)
        assert engine.generate([prompt], max_tokens=1)[0].cached == 896
        assert engine.reset()
    assert shard.state.counters.evicted - before > capacity
