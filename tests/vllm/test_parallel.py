"""Two workers, in processes of their own: real engines.

As tensor-parallel ranks, each with half of every layer, and as pipeline stages, one with one layer
and one with three: so slices differ in size, and the first stage has no layer of the second group.
Both on one node, with one arena, and as if each were on a node of its own, with an arena each.
The scheduler half and the shards are in this process. Every hit is compared with vLLM's own prefix
cache in the same engine: tokens and logprobs, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv_ray.vllm.engine.metadata import LayoutReport, WorkerReport
from lmkv_ray.vllm.engine.versions import FAILED_LOADS_SINCE, vllm_version
from lmkv_ray.vllm.scheduler.half import SchedulerHalf
from lmkv_ray.vllm.scheduler.places import Place
from lmkv_ray.vllm.scheduler.startup import open_places
from tests.vllm.conftest import (
    EXPENSIVE,
    engine_on,
    forget,
    own_hit_and_ours,
    save_prompt,
    tokens,
    wait_for_slots,
)
from tests.vllm.engine import Engine
from tests.vllm.local_shard import LocalShard
from tests.vllm.storm import assert_nothing_is_held, storm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        vllm_version() < FAILED_LOADS_SINCE, reason="several KV groups are refused on vLLM 0.29"
    ),
]

BLOCK = 32
FAR = "another host"


class Shards:
    """Those of the nodes of one engine."""

    def __init__(self, nodes: int) -> None:
        self.all = [LocalShard(64 << 20) for _ in range(nodes)]

    @property
    def chunks(self) -> int:
        return sum(len(shard.state.chunks) for shard in self.all)

    def connect(self, *_: object, host: str | None = None, **__: object) -> LocalShard:
        return self.all[host is not None]

    def evict_all(self) -> None:
        for shard in self.all:
            shard.evict_all()

    def close(self) -> None:
        for shard in self.all:
            shard.close()


def spread(config: Any, settings: Any, groups: Any, reports: Any, **rest: Any) -> list[Place]:
    """The second worker says that it is on another host."""
    near, far = reports
    moved: Sequence[LayoutReport] = [near, replace(far, host=FAR)]
    return open_places(config, settings, groups, moved, **rest)


@pytest.fixture(
    scope="module",
    params=[("tensor", 1), ("pipeline", 1), ("tensor", 2), ("pipeline", 2)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def shape(request: pytest.FixtureRequest) -> tuple[str, int]:
    """What the workers are, and on how many nodes."""
    kind, nodes = request.param
    return kind, nodes


@pytest.fixture(scope="module")
def shards(shape: tuple[str, int]) -> Iterator[Shards]:
    made = Shards(shape[1])
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(shape: tuple[str, int], sliding_model: str, shards: Shards) -> Iterator[Engine]:
    kind, nodes = shape
    options: dict[str, Any] = {f"{kind}_parallel_size": 2}
    with pytest.MonkeyPatch.context() as patch:
        if nodes == 2:
            patch.setattr("lmkv_ray.vllm.scheduler.startup.open_places", spread)
        if kind == "pipeline":
            patch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
        with engine_on(
            shards,
            sliding_model,
            num_gpu_blocks_override=300,
            max_num_batched_tokens=1024,
            **options,
        ) as made:
            yield made


def test_a_chunk_is_the_slices_of_the_ranks_of_a_node(
    engine: Engine, shape: tuple[str, int]
) -> None:
    places = engine.connector()._scheduler._places
    shares = [share.offsets for place in places for share in place.shares.values()]
    sizes = [list(place.nbytes) for place in places]
    match shape:
        case "tensor", 1:
            half = shares[1]
            assert (shares[0], sizes) == ((0, 0), [[2 * half[0], 2 * half[1]]])
        case "tensor", 2:
            assert (shares, sizes[0]) == ([(0, 0), (0, 0)], sizes[1])
        case "pipeline", 1:  # one of two layers with a window; none of two with full attention
            assert (shares[0], sizes[0][0], shares[1][1]) == ((0, 0), 2 * shares[1][0], 0)
        case "pipeline", 2:
            assert (shares, sizes[0][0], sizes[0][1]) == ([(0, 0), (0, 0)], sizes[1][0], 0)
    assert len({place.namespace for place in places}) == shape[1]


def test_several_batches_in_flight_are_saved_and_loaded(
    engine: Engine, shape: tuple[str, int], shards: Shards
) -> None:
    forget(engine, shards)
    if shape[0] == "pipeline":
        assert engine.core().batch_queue_size == 2
    prompts = [tokens(seed, 9 * BLOCK + seed) for seed in range(1, 7)]
    wait_for_slots(engine, prompts)
    computed = engine.generate(prompts, max_tokens=3 * BLOCK)
    engine.wait_saved()
    assert engine.reset(), "blocks are still held"
    loaded = engine.generate(prompts, max_tokens=3 * BLOCK)
    assert [answer.tokens for answer in loaded] == [answer.tokens for answer in computed]
    assert [answer.cached for answer in loaded] == [9 * BLOCK] * 6


@settings(EXPENSIVE, max_examples=10)
@given(
    seed=st.integers(0, 1 << 30),
    shared=st.integers(0, 800),
    suffix=st.integers(1, 150),
)
def test_a_hit_is_vllms_own(
    engine: Engine, shards: Shards, seed: int, shared: int, suffix: int
) -> None:
    first = tokens(seed, shared + 1)
    second = first[:-1] + tokens(seed + 1, suffix)
    own, ours = own_hit_and_ours(engine, shards, first, second)
    assert ours == own
    assert ours.cached == shared // BLOCK * BLOCK


def test_a_chunk_that_one_rank_did_not_save_is_not_kept(
    engine: Engine, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(engine, shards)
    prompt = tokens(1, 8 * BLOCK + 3)
    seen: list[int] = []
    on_report = SchedulerHalf.on_report

    def spoil_every_second(half: SchedulerHalf, report: WorkerReport) -> None:
        # The ranks of a node may report a chunk in different steps: of one of them it is spoilt.
        for job_id in [job for job in report.saved if job % 2 and job not in seen]:
            report.saved[job_id] -= 1
            report.unsaved[job_id] = report.unsaved.get(job_id, 0) + 1
            seen.append(job_id)
        on_report(half, report)

    monkeypatch.setattr(SchedulerHalf, "on_report", spoil_every_second)
    wait_for_slots(engine, [prompt])
    engine.generate([prompt], max_tokens=1)
    engine.wait_saved()
    assert seen
    kept = sum(len(place.links) for place in engine.connector()._scheduler._places)
    assert shards.chunks == kept * 8 - len(seen)
    assert not engine.connector()._scheduler.saving
    assert engine.reset(), "blocks of spoilt saves are still held"


def test_a_load_that_is_torn_for_one_rank_is_recomputed(
    engine: Engine, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks are replaced after they were found, before the workers copy them."""
    forget(engine, shards)
    prompt = tokens(2, 8 * BLOCK + 3)
    [cold] = engine.generate([prompt])
    forget(engine, shards)
    save_prompt(engine, prompt)
    step = SchedulerHalf.step

    def lose_and_step(half: SchedulerHalf, output: object) -> object:
        made = step(half, output)
        if made.loads:
            shards.evict_all()
        return made

    monkeypatch.setattr(SchedulerHalf, "step", lose_and_step)
    [answer] = engine.generate([prompt])
    assert answer.tokens == cold.tokens
    assert answer.cached == 0
    assert engine.connector()._scheduler._tracked == {}


def test_aborts_with_several_batches_in_flight_leave_nothing_behind(
    engine: Engine, shards: Shards
) -> None:
    forget(engine, shards)
    whole = storm(engine, 12, 20)
    assert_nothing_is_held(engine)
    for prompt, answer in whole:
        forget(engine, shards)
        [cold] = engine.generate([prompt], max_tokens=20)
        assert (cold.cached, answer) == (0, cold.tokens)
