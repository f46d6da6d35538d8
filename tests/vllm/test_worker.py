"""Workers on synthetic pages of latent attention: one copy of a chunk, which all ranks read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lmkv_ray.arena import this_process
from lmkv_ray.config import load_settings
from lmkv_ray.keys import chunk_key, key_array
from lmkv_ray.messages import Commit, Exchange, Hello
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.metadata import (
    ArenaRef,
    LoadJob,
    SaveJob,
    Share,
    StepMetadata,
    share_chunks,
)
from lmkv_ray.vllm.worker.half import WorkerHalf
from tests.vllm.conftest import wait_for
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

BLOCKS, LATENT = 12, 72
GROUP = Group(0, block_tokens=16, blocks=2, hash_tokens=16)


def worker(
    rank: int, *, idle_group: bool = False, **settings: object
) -> tuple[WorkerHalf, torch.Tensor]:
    """One of two ranks, and its pages: two layers of one latent head.

    With ``idle_group`` there is a first group of which it has no layer, as a pipeline stage may.
    """
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=rank),
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(model="latent"),
        cache_config=SimpleNamespace(kv_cache_layout="LBHNC"),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    names: list[list[str]] = [[], ["a", "b"]] if idle_group else [["a", "b"]]
    cache = SimpleNamespace(
        num_blocks=BLOCKS, kv_cache_groups=[SimpleNamespace(layer_names=layers) for layers in names]
    )
    groups = [replace(GROUP, number=number) for number in range(len(names))]
    wanted = load_settings({"copy_threads": 1, **settings})
    half = WorkerHalf(config, cache, groups, settings=wanted)
    pages = torch.zeros(2, BLOCKS, 1, 16, LATENT, dtype=torch.bfloat16)
    half.register({"a": pages[0], "b": pages[1]})
    return half, pages


@pytest.fixture
def workers() -> Iterator[list[tuple[WorkerHalf, torch.Tensor]]]:
    made = [worker(0), worker(1)]
    yield made
    for half, _ in made:
        half.shutdown()


def test_one_rank_writes_a_chunk_and_all_read_it(
    workers: list[tuple[WorkerHalf, torch.Tensor]], shard: LocalShard
) -> None:
    nbytes, shares = share_chunks([half.layout_report() for half, _ in workers], replicas=2)
    assert nbytes == [2 * 2 * 16 * LATENT * 2], "one copy: two blocks of two layers"
    ref = ArenaRef(shard.writer.path, shard.writer.arena_id, shares)
    hello = Hello(
        engine_id="mla", owner=this_process(), space=9, model="m", slot_bytes=nbytes[0], held=[]
    )
    shard.shard.hello(hello)
    grant = shard.shard.exchange(Exchange(engine_id="mla", want=4)).grant
    assert grant is not None
    slots = grant.slots[:4]
    filled = torch.randn(2, BLOCKS, 1, 16, LATENT).to(torch.bfloat16)
    for half, pages in workers:
        pages.copy_(filled)
        saves = [
            SaveJob(i, 0, ref.arena_id, slot, [2 * i, 2 * i + 1], time.monotonic() + 30)
            for i, slot in enumerate(slots)
        ]
        half.begin_loads(StepMetadata((ref,), [], [], idle=False))
        half.begin_saves(StepMetadata((ref,), [], saves, idle=False))
        done: set[int] = set()

        def all_saved(half: WorkerHalf = half, done: set[int] = done) -> bool:
            half.finished_loads()
            report = half.report()
            done.update(report.saved if report else ())
            return len(done) == len(slots)

        wait_for(all_saved)
    written = [half.take_stats() for half, _ in workers]
    assert [stats.data["save_bytes"] for stats in written if stats] == [2 * nbytes[0]] * 2
    keys = [chunk_key(b"n" * 16, bytes([i])) for i in range(4)]
    commits = [Commit(slot=s, key=k, nbytes=nbytes[0]) for s, k in zip(slots, keys, strict=True)]
    shard.shard.exchange(Exchange(engine_id="mla", commits=commits))
    hits = shard.shard.reader.lookup(key_array(keys))
    assert hits.found.all()
    for half, pages in workers:
        pages.zero_()
        blocks = list(range(8))
        found = hits.slots.tolist(), hits.generations.tolist()
        job = LoadJob("r", ref.arena_id, 0, 0, *found, 0, blocks)
        half.begin_loads(StepMetadata((ref,), [job], [], idle=True))

        def loaded(half: WorkerHalf = half) -> bool:
            return half.finished_loads() == ({"r"}, set())

        wait_for(loaded)
        assert torch.equal(pages[:, :8], filled[:, :8])


def test_a_lost_load_ends_as_a_failed_one(
    workers: list[tuple[WorkerHalf, torch.Tensor]], shard: LocalShard
) -> None:
    half, _ = workers[0]
    ref = ArenaRef(shard.writer.path, shard.writer.arena_id, {0: Share((0,))})
    half.begin_loads(StepMetadata((ref,), [LoadJob.lost("r", [3, 4])], [], idle=True))
    wait_for(lambda: half.finished_loads()[0] == {"r"})
    assert half.invalid_blocks() == {3, 4}
    report = half.report()
    assert report is not None
    assert report.failed_loads == {"r": 0}


def test_a_group_without_layers_here_is_done_at_once(shard: LocalShard) -> None:
    half, _ = worker(0, idle_group=True)
    nbytes, shares = share_chunks([half.layout_report()], replicas=1)
    assert (nbytes[0], nbytes[1] > 0) == (0, True)
    ref = ArenaRef(shard.writer.path, shard.writer.arena_id, shares)
    save = SaveJob(1, 0, ref.arena_id, 0, [1, 2], time.monotonic() + 30)
    load = LoadJob("r", ref.arena_id, 0, 0, [0], [0], 0, [3, 4])
    half.begin_loads(StepMetadata((ref,), [load], [], idle=True))
    half.begin_saves(StepMetadata((ref,), [], [save], idle=False))
    assert half.finished_loads() == ({"r"}, set())
    report = half.report()
    assert report is not None
    assert report.saved == {1: 1}
    half.shutdown()


def test_saves_of_a_step_without_tokens_do_not_wait_to_be_asked_for(shard: LocalShard) -> None:
    """``wait_for_save`` is called in such a step by vLLM 0.31 and later only."""
    half, _ = worker(0, idle_group=True)
    ref = ArenaRef(shard.writer.path, shard.writer.arena_id, {0: Share((0, 0))})
    save = SaveJob(1, 0, ref.arena_id, 0, [1, 2], time.monotonic() + 30)
    step = StepMetadata((ref,), [], [save], idle=True)
    half.begin_loads(step)
    assert half.finished_loads() == (set(), set())
    report = half.report()
    assert report is not None
    assert report.saved == {1: 1}
    half.begin_saves(step)
    assert half.report() is None, "saved twice"
    half.shutdown()


def test_jobs_of_other_places_are_left_to_others(shard: LocalShard) -> None:
    half, _ = worker(1)
    ref = ArenaRef(shard.writer.path, shard.writer.arena_id, {1: Share((0,))})
    elsewhere = ArenaRef("/nowhere", 7, {0: Share((0,))})
    load = LoadJob("r", 7, 0, 0, [0], [0], 0, [3, 4], place=0)
    save = SaveJob(1, 0, 7, 0, [1, 2], time.monotonic() + 30, place=0)
    half.begin_loads(StepMetadata((elsewhere, ref), [load], [], idle=True))
    half.begin_saves(StepMetadata((elsewhere, ref), [], [save], idle=False))
    assert half.finished_loads() == (set(), set())
    assert half.report() is None
    half.shutdown()
