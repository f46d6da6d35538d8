"""What requests may say of their chunks, what followers are told, and what the shard is asked for.

One engine that publishes KV events, and a shard in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lmkv_ray.messages import Stage, decode
from lmkv_ray.vllm.scheduler import arena_events
from tests.vllm.conftest import engine_on, forget, save_prompt, tokens, wait_for
from tests.vllm.engine import Engine
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(float32_model: str, shard: LocalShard) -> Iterator[Engine]:
    from vllm.config import KVEventsConfig

    with engine_on(
        shard,
        float32_model,
        connector={"stage_min_tokens": 64},
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    ) as made:
        yield made


@pytest.fixture
def published(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Events that vLLM publishes."""
    seen: list[Any] = []
    publisher = engine.core().scheduler.kv_event_publisher
    monkeypatch.setattr(publisher, "publish", lambda batch: seen.extend(batch.events))
    return seen


def cpu_hashes(events: list[Any], kind: str) -> list[bytes]:
    mine = [e for e in events if type(e).__name__ == kind and e.medium == "CPU"]
    return [block_hash for event in mine for block_hash in event.block_hashes]


def test_a_request_gets_its_keys_and_pins_its_chunks(engine: Engine, shard: LocalShard) -> None:
    prompt = tokens(1, 200)
    output = engine.ask(prompt, {"lmkv": {"keys": True, "pin": True}})
    engine.wait_saved()
    keys = [bytes.fromhex(key) for key in output.kv_transfer_params["lmkv_keys"]]
    assert len(keys) == 200 // 32
    assert set(keys) <= set(shard.state.chunks)
    assert shard.state.chunks.pin(keys, True) == keys
    assert set(shard.state.chunks.pinned()) == set(keys)
    shard.state.chunks.pin(keys, False)
    assert engine.ask(prompt, {"lmkv": "nonsense"}).kv_transfer_params is None


def test_followers_hear_of_both_tiers(
    engine: Engine, shard: LocalShard, published: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_events, "CHECK_SECONDS", 0.0)
    forget(engine, shard)
    prompt = tokens(2, 300)
    save_prompt(engine, prompt)
    engine.generate([tokens(3, 10)])  # what was saved last is told with the next step
    stored = cpu_hashes(published, "BlockStored")
    on_device = [h for e in published if getattr(e, "medium", "") == "GPU" for h in e.block_hashes]
    assert len(stored) == 9
    assert set(stored) <= set(on_device)
    told = next(e for e in published if type(e).__name__ == "BlockStored" and e.medium == "CPU")
    assert told.token_ids == prompt[:32]
    assert told.parent_block_hash is None
    shard.evict_all()
    engine.generate([tokens(4, 10)])
    engine.generate([tokens(5, 10)])
    assert set(stored) <= set(cpu_hashes(published, "BlockRemoved"))


def test_the_shard_learns_what_computing_would_take(
    engine: Engine, shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Stage] = []
    answer = shard.stage

    def stage(payload: bytes) -> bytes:
        asked.append(decode(payload, Stage))
        return answer(payload)

    monkeypatch.setattr(shard, "stage", stage)
    for seed in range(6):
        engine.generate([tokens(10 + seed, 400)])
    shard.peers = 1
    try:
        wait_for(lambda: engine.connector()._link.peers == 1)
        engine.generate([tokens(20, 500)])
    finally:
        shard.peers = 0
    [stage_message] = asked
    assert len(stage_message.keys) == 15 * 16
    remaining = stage_message.remaining
    assert len(remaining) == 16
    assert remaining == sorted(remaining, reverse=True)
    assert 0 < remaining[-1] < remaining[0] < 60
