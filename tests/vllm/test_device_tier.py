"""vLLM's own prefix cache as the top tier: what the shard is told of it, and what is not fetched.

One real engine, and a shard in this process.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import Stage, decode
from tests.vllm.conftest import engine_on, forget, tokens, wait_for
from tests.vllm.engine import Engine
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

BLOCKS = 40


@pytest.fixture(scope="module")
def engine(float32_model: str, shard: LocalShard) -> Iterator[Engine]:
    with engine_on(
        shard,
        float32_model,
        connector={"stage_min_tokens": 32, "load_when": "always", "stage_seconds": 1.0},
        num_gpu_blocks_override=BLOCKS,
        max_model_len=1024,
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def empty(engine: Engine, shard: LocalShard) -> None:
    forget(engine, shard)
    wait_for(lambda: on_device(engine, shard) == set())


@pytest.fixture
def asked(shard: LocalShard, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[bytes]]]:
    """Keys of each stage that the engine asks for, while other nodes are said to hold chunks."""
    stages: list[list[bytes]] = []
    answer = shard.stage

    def stage(payload: bytes) -> bytes:
        stages.append(key_list(key_array(decode(payload, Stage).keys)))
        return answer(payload)

    monkeypatch.setattr(shard, "stage", stage)
    shard.peers = 1
    yield stages
    shard.peers = 0


def on_device(engine: Engine, shard: LocalShard) -> set[bytes]:
    """What the shard knows of the engine's device."""
    connector = engine.connector()
    assert set(shard.state.devices.content) <= {connector._link._talk.engine_id}
    return {key for keys in shard.state.devices.content.values() for key in keys}


def test_what_was_read_and_generated_is_on_the_device(engine: Engine, shard: LocalShard) -> None:
    prompt = tokens(1, 200)
    [answer] = engine.generate([prompt], max_tokens=80)
    keys = engine.keys([*prompt, *answer.tokens])
    assert len(keys) == 8
    wait_for(lambda: on_device(engine, shard) == set(keys))


def test_a_reset_is_noticed_though_the_engine_is_idle(engine: Engine, shard: LocalShard) -> None:
    keys = engine.keys(tokens(2, 320))
    engine.wait_saved()
    wait_for(lambda: on_device(engine, shard) == set(keys))
    assert engine.reset()
    wait_for(lambda: on_device(engine, shard) == set(), 5)
    assert set(keys) <= set(shard.state.chunks), "memory still has them"
    engine.generate([tokens(2, 320)])  # loaded
    wait_for(lambda: on_device(engine, shard) == set(keys), 5)


def test_what_makes_room_on_the_device_is_not_there(engine: Engine, shard: LocalShard) -> None:
    """More is read than the device holds, and requests preempt each other."""
    first = engine.keys(tokens(3, 320))
    wait_for(lambda: on_device(engine, shard) == set(first))
    engine.generate([tokens(10 + i, 250) for i in range(6)], max_tokens=150)
    pool = engine.connector()._pool
    cached = len(pool.cached_block_hash_to_block)
    assert 0 < cached < BLOCKS

    def told() -> bool:
        held = on_device(engine, shard)
        return len(held) == cached and not set(first) <= held

    wait_for(told, 10)


def test_a_restarted_shard_learns_of_the_device(engine: Engine, shard: LocalShard) -> None:
    keys = engine.keys(tokens(4, 320))
    wait_for(lambda: on_device(engine, shard) == set(keys))
    shard.restart()
    assert on_device(engine, shard) == set()
    wait_for(lambda: on_device(engine, shard) == set(keys), 15)


def test_what_the_device_holds_is_not_fetched(
    engine: Engine, shard: LocalShard, asked: list[list[bytes]]
) -> None:
    """The arena has lost it all, other nodes may have it: only what the device lacks is staged."""
    wait_for(lambda: engine.connector()._link.peers == 1)
    start = tokens(5, 320)
    known = engine.keys(start)
    engine.wait_saved()
    asked.clear()
    shard.evict_all()
    [again] = engine.generate([start])
    assert again.cached == 288
    assert asked == []
    engine.wait_saved()
    shard.evict_all()
    whole = engine.keys([*start, *tokens(6, 320)])
    assert len(whole) == 20
    assert asked == [whole[10:19]]
    assert whole[:10] == known
