"""Two tensor-parallel workers, in processes of their own, share one arena: real engines.

The scheduler half and the shard are in this process. Every hit is compared with vLLM's own prefix
cache in the same engine: tokens and logprobs, to the bit. The model has two KV groups as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv_ray.vllm.metadata import WorkerReport
from lmkv_ray.vllm.scheduler import SchedulerHalf
from tests.vllm.conftest import EXPENSIVE, engine_on, own_hit_and_ours, save_prompt, tokens
from tests.vllm.engine import Engine
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

BLOCK = 32


@pytest.fixture(scope="module")
def engine(sliding_model: str, shard: LocalShard) -> Iterator[Engine]:
    with engine_on(
        shard,
        sliding_model,
        tensor_parallel_size=2,
        num_gpu_blocks_override=300,
        max_num_batched_tokens=1024,
    ) as made:
        yield made


def test_a_chunk_is_the_slices_of_both_ranks_side_by_side(engine: Engine) -> None:
    shape = engine.connector()._scheduler._shape
    first, second = shape.offsets
    assert first == (0, 0)
    assert [2 * offset for offset in second] == list(shape.nbytes)


@settings(EXPENSIVE, max_examples=10)
@given(
    seed=st.integers(0, 1 << 30),
    shared=st.integers(0, 800),
    suffix=st.integers(1, 150),
)
def test_a_hit_is_vllms_own(
    engine: Engine, shard: LocalShard, seed: int, shared: int, suffix: int
) -> None:
    first = tokens(seed, shared + 1)
    second = first[:-1] + tokens(seed + 1, suffix)
    own, ours = own_hit_and_ours(engine, shard, first, second)
    assert ours == own
    assert ours.cached == shared // BLOCK * BLOCK


def test_a_chunk_that_one_rank_did_not_save_is_not_kept(
    engine: Engine, shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.reset()
    shard.evict_all()
    prompt = tokens(1, 8 * BLOCK + 3)
    seen: list[int] = []
    on_report = SchedulerHalf.on_report

    def spoil_every_second(half: SchedulerHalf, report: WorkerReport) -> None:
        for job_id in [job for job, ranks in report.saved.items() if ranks == 2 and job % 2]:
            report.saved[job_id] = 1
            report.unsaved[job_id] = 1
            seen.append(job_id)
        on_report(half, report)

    monkeypatch.setattr(SchedulerHalf, "on_report", spoil_every_second)
    engine.generate([prompt], max_tokens=1)
    engine.wait_saved()
    assert seen
    assert len(shard.state.chunks) == 2 * 8 - len(seen)
    assert not engine.connector()._scheduler.saving
    assert engine.reset(), "blocks of spoilt saves are still pinned"


def test_a_load_that_is_torn_for_one_rank_is_recomputed(
    engine: Engine, shard: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks are replaced after they were found, before the workers copy them."""
    engine.reset()
    shard.evict_all()
    prompt = tokens(2, 8 * BLOCK + 3)
    [cold] = engine.generate([prompt])
    engine.reset()
    shard.evict_all()
    save_prompt(engine, prompt)
    step = SchedulerHalf.step

    def lose_and_step(half: SchedulerHalf, output: object) -> object:
        made = step(half, output)  # type: ignore[arg-type]
        if made.loads:
            shard.evict_all()
        return made

    monkeypatch.setattr(SchedulerHalf, "step", lose_and_step)
    [answer] = engine.generate([prompt])
    assert answer.tokens == cold.tokens
    assert answer.cached == 0
    assert engine.connector()._scheduler._tracked == {}
