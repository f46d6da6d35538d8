"""What goes down to the tiers, and comes up again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.cost.sources import STALE_SECONDS
from lmkv_ray.messages import MissReason, Stage, StageReply, decode
from lmkv_ray.node.demotion import Demotion
from lmkv_ray.node.shard import Shard
from lmkv_ray.node.sources import TierFinder
from lmkv_ray.node.staging import Staging
from lmkv_ray.shard import Admission
from tests.node.fakes import (
    CHUNK_BYTES,
    FakeEngine,
    LocalShard,
    make_keys,
    new_arena,
    payload_of,
)
from tests.tiers.harness import until
from tests.tiers.memory_tier import MemoryTier

SETTINGS = load_settings({"capacity": 8 << 20})
KEYS = make_keys(20)


@pytest.fixture
def shard() -> Iterator[LocalShard]:
    shard = LocalShard(new_arena(SETTINGS), SETTINGS, "here")
    shard.state.chunks.admission = Admission("second_hit")
    yield shard
    shard.close()


@pytest.fixture
def engine(shard: LocalShard) -> Iterator[FakeEngine]:
    engine = FakeEngine(shard.call)
    yield engine
    engine.close()


def use_again(shard: Shard, keys: list[bytes]) -> None:
    shard.state.chunks.touch(b"".join(reversed(keys)))


def request(engine: FakeEngine, remaining: list[float] | None = None) -> Stage:
    stage = decode(engine.stage_message(KEYS, 10), Stage)
    return Stage(
        engine_id=stage.engine_id,
        keys=stage.keys,
        slot_bytes=stage.slot_bytes,
        within=stage.within,
        remaining=remaining or [],
    )


async def test_what_is_used_again_goes_down_and_comes_up(
    shard: LocalShard, engine: FakeEngine
) -> None:
    tiers = [MemoryTier("a"), MemoryTier("b")]
    engine.save(KEYS)
    use_again(shard, KEYS[:15])
    await Demotion(shard, tiers).step()
    assert [list(tier.chunks) for tier in tiers] == [KEYS[:15], KEYS[:15]]
    assert tiers[0].chunks[KEYS[3]] == (engine.space, payload_of(KEYS[3]))
    shard.clear(None)
    staging = Staging(shard, [TierFinder(tiers[1], lambda: True)])
    reply = await staging.stage(request(engine))
    assert reply == StageReply(ready=15, reason=MissReason.CLEARED)
    assert engine.intact(KEYS) == 15


async def test_a_chunk_that_was_replaced_while_it_was_written_is_not_published(
    shard: LocalShard, engine: FakeEngine
) -> None:
    tier = MemoryTier()
    tier.gate.clear()
    engine.save(KEYS)
    use_again(shard, KEYS)
    writing = asyncio.create_task(Demotion(shard, [tier]).step())
    await tier.asked.wait()
    shard.clear(None)
    tier.gate.set()
    await writing
    assert not tier.chunks


async def test_a_tier_that_hangs_does_not_hold_up_the_others(
    shard: LocalShard, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmkv_ray.node.demotion.PASS_SECONDS", 0.05)
    tiers = [MemoryTier("a"), MemoryTier("b")]
    tiers[0].gate.clear()
    demotion = Demotion(shard, tiers)
    engine.save(KEYS)
    for part in (KEYS[:5], KEYS[5:10]):
        use_again(shard, part)
        await demotion.step()
    assert list(tiers[1].chunks) == KEYS[:10]
    assert not tiers[0].chunks
    tiers[0].gate.set()
    await until(lambda: len(tiers[0].chunks) == 5)
    await demotion.step()
    use_again(shard, KEYS[10:])
    await demotion.step()
    assert list(tiers[0].chunks) == KEYS[:5] + KEYS[10:]


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
async def test_what_a_tier_raises_is_told_and_does_not_hold_up_the_others(
    shard: LocalShard, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """It promised not to raise; memory may run out all the same."""
    monkeypatch.setattr("lmkv_ray.node.demotion.PASS_SECONDS", 0.05)
    tiers = [MemoryTier("a"), MemoryTier("b")]
    tiers[0].error = MemoryError("no memory")
    if late:
        tiers[0].gate.clear()
    demotion = Demotion(shard, tiers)
    engine.save(KEYS)
    use_again(shard, KEYS[:5])
    if late:
        await demotion.step()
        tiers[0].gate.set()
        await until(demotion._tasks["a"].done)
    with pytest.raises(ExceptionGroup) as raised:
        await demotion.step()
    assert raised.value.exceptions == (tiers[0].error,)
    assert list(tiers[1].chunks) == KEYS[:5]
    tiers[0].error = None
    use_again(shard, KEYS[5:10])
    await demotion.step()
    assert list(tiers[0].chunks) == KEYS[5:10]
    assert list(tiers[1].chunks) == KEYS[:10]


async def test_a_tier_that_may_hold_what_was_cleared_is_not_read(
    shard: LocalShard, engine: FakeEngine
) -> None:
    tier, readable = MemoryTier(), [False]
    engine.save(KEYS)
    use_again(shard, KEYS)
    await Demotion(shard, [tier]).step()
    shard.evict(KEYS)
    staging = Staging(shard, [TierFinder(tier, lambda: readable[0])])
    assert (await staging.stage(request(engine))).ready == 0
    readable[0] = True
    assert (await staging.stage(request(engine))).ready == 20


async def test_only_what_is_worth_it_is_fetched(shard: LocalShard, engine: FakeEngine) -> None:
    tier = MemoryTier()
    engine.save(KEYS)
    use_again(shard, KEYS)
    await Demotion(shard, [tier]).step()
    shard.state.chunks.admission = Admission(None)
    shard.evict(KEYS)
    staging = Staging(shard, [TierFinder(tier, lambda: True)])
    for _ in range(9):  # half a second a chunk
        for n in (1, 5, 20):
            staging.models["memory"].observe(n * CHUNK_BYTES, 0.5 * n)
    # The first ten chunks save two seconds each, the others nearly nothing.
    remaining = [2.0 * max(0, 10 - k) + 0.01 * (20 - k) for k in range(21)]
    reply = await staging.stage(request(engine, remaining))
    assert reply.ready == 10
    assert reply.reason is MissReason.CHEAPER_TO_COMPUTE
    assert staging.counters.left_to_compute >= 10
    assert staging.counters.expected_seconds > 4
    # What was not used for long is tried again, or it would never be seen to have become quick.
    shard.evict(KEYS)
    staging.models["memory"]._observed_at -= STALE_SECONDS
    assert (await staging.stage(request(engine, remaining))).ready == 20
