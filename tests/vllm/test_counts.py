"""Every prompt token is counted, as vLLM's Prometheus metrics show it: a hit, or a miss and why.

One engine and a shard in this process that does as it is told.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest

from lmkv_ray.arena import ArenaReader
from lmkv_ray.messages import MissReason, StageReply
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.identity.ages import Identity
from lmkv_ray.vllm.link.slots import Slots
from tests.vllm.conftest import engine_on, save_prompt, tokens, wait_for
from tests.vllm.engine import Engine
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

WHOLE, TAIL = 288, 12
"""Tokens of a prompt: in chunks, and left over."""

SEEDS = itertools.count(100)
"""Of prompts that nobody has seen."""


@dataclass(frozen=True)
class World:
    engine: Engine
    shard: LocalShard
    patch: pytest.MonkeyPatch
    prompt: list[int]
    sampling: dict[str, int] = field(default_factory=dict)
    """What is asked besides the answer."""


@pytest.fixture(scope="module")
def engine(float32_model: str, shard: LocalShard) -> Iterator[Engine]:
    settings = {"stage_seconds": 0.5, "stage_min_tokens": 64}
    with engine_on(shard, float32_model, connector=settings) as made:
        yield made


@pytest.fixture
def world(engine: Engine, shard: LocalShard, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield World(engine, shard, monkeypatch, tokens(next(SEEDS), WHOLE + TAIL))
    monkeypatch.undo()
    shard.frozen.clear()
    shard.peers, shard.stage_reply = 0, None
    wait_for(lambda: engine.connector()._link.peers == 0)


def stored(world: World) -> None:
    save_prompt(world.engine, world.prompt)


def evicted(world: World) -> None:
    stored(world)
    world.shard.evict_all()


def cleared(world: World) -> None:
    stored(world)
    space = world.engine.connector()._scheduler._identity.space(0)
    world.shard.call("clear", space.to_bytes(8, "little")).result()


def without_slots(world: World) -> None:
    with world.patch.context() as patch:
        patch.setattr(Slots, "take", lambda _: None)
        world.engine.generate([world.prompt], max_tokens=1)
    assert world.engine.reset()


def detached(world: World) -> None:
    world.patch.setattr(world.engine.connector()._link, "attachment", None)


def another_namespace(world: World) -> None:
    world.patch.setattr(world.engine.connector()._link, "differs", True)


def unsound(world: World) -> None:
    stored(world)
    world.patch.setattr(ArenaReader, "unchanged", lambda _, slots, __: slots < 0)


def elsewhere(world: World, answer: MissReason) -> None:
    world.shard.peers = 1
    world.shard.stage_reply = StageReply(ready=0, reason=answer)
    wait_for(lambda: world.engine.connector()._link.peers == 1)


def elsewhere_but_slow(world: World) -> None:
    elsewhere(world, MissReason.NEVER_STORED)
    world.shard.frozen.set()


def unidentified(world: World) -> None:
    stored(world)
    world.patch.setattr(Identity, "adopt", lambda value: setattr(value, "known", False))


def must_be_computed(world: World) -> None:
    stored(world)
    world.sampling["prompt_logprobs"] = 1


WAYS: dict[MissReason, Callable[[World], None]] = {
    MissReason.NEVER_STORED: lambda _: None,
    MissReason.EVICTED: evicted,
    MissReason.CLEARED: cleared,
    MissReason.SAVE_DROPPED: without_slots,
    MissReason.STAGE_TIMEOUT: elsewhere_but_slow,
    MissReason.FETCH_FAILED: partial(elsewhere, answer=MissReason.FETCH_FAILED),
    MissReason.CHEAPER_TO_COMPUTE: partial(elsewhere, answer=MissReason.CHEAPER_TO_COMPUTE),
    MissReason.LOAD_FAILED: unsound,
    MissReason.DETACHED: detached,
    MissReason.OTHER_NAMESPACE: another_namespace,
    MissReason.IDENTITY_PENDING: unidentified,
    MissReason.NOT_READ: must_be_computed,
    MissReason.TAIL: stored,
}
"""For each reason, what makes a prompt's chunks be missed because of it."""


def test_each_reason_is_tried() -> None:
    assert WAYS.keys() == set(MissReason) - {MissReason.COMPOSED}, "that one: test_anywhere"


@pytest.mark.parametrize("reason", WAYS)
def test_every_miss_has_its_reason(world: World, reason: MissReason) -> None:
    WAYS[reason](world)
    before = world.engine.counted()
    world.engine.generate([world.prompt], max_tokens=1, **world.sampling)
    counted = {name: n - before.get(name, 0) for name, n in world.engine.counted().items()}
    missed = {value: counted[value] for value in MissReason if counted.get(value)}
    assert missed == {reason: WHOLE} | {MissReason.TAIL: TAIL}
    found = reason in (MissReason.TAIL, MissReason.LOAD_FAILED)
    assert counted.get("hit_tokens", 0) == (WHOLE if found else 0)
    assert counted.get("failed_loads", 0) == (reason is MissReason.LOAD_FAILED)


def test_what_is_saved_and_loaded_is_counted(engine: Engine, shard: LocalShard) -> None:
    before = engine.counted()
    prompt = tokens(1, WHOLE + TAIL)
    save_prompt(engine, prompt)
    engine.generate([prompt], max_tokens=1)
    engine.generate([tokens(2, 10)], max_tokens=1)  # a step after the last report
    counted = {name: n - before.get(name, 0) for name, n in engine.counted().items()}
    assert counted["saved_chunks"] == WHOLE // 32
    assert counted["save_bytes"] == counted["load_bytes"] > 0
    assert counted.get("dropped_chunks", 0) == 0


def test_vllms_log_line_shows_rates() -> None:
    stats = LmkvStats(data={"load_bytes": 3_000_000_000, "load_seconds": 2.0})
    stats.aggregate(pickle.loads(pickle.dumps(LmkvStats(data={"hit_tokens": 5}))))
    assert stats.reduce() == {"hit_tokens": 5, "load_bytes": 3_000_000_000, "load_GB_per_s": 1.5}
