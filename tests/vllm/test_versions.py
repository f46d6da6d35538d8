"""What stands in for what a version of vLLM lacks, without an engine."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.metadata import WorkerReport
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.engine.versions import BlockTables
from lmkv_ray.vllm.link.slots import GrantedSlot
from lmkv_ray.vllm.scheduler.saves import REPORT_SECONDS, Saver

pytestmark = pytest.mark.vllm


def test_a_copied_table_is_kept_until_the_next_copy_and_the_end() -> None:
    """As vLLM 0.29 hands them out."""
    tables = BlockTables()
    assert tables.now(SimpleNamespace(block_ids={"a": ([1],)}))("a") == ([1],)
    assert tables.now(SimpleNamespace(block_ids={"b": ([2],)}))("a") == ([1],)
    tables.now(SimpleNamespace(block_ids={"a": ([3, 4],)}))
    assert tables.now(SimpleNamespace(block_ids={}))("a") == ([3, 4],), "from before a preemption"
    tables.forget("a")
    now = tables.now(SimpleNamespace(block_ids={}))
    assert (now("a"), now("b")) == (None, ([2],))


def test_a_table_that_can_be_looked_up_is_not_kept() -> None:
    tables = BlockTables()
    held = {"a": ([1],)}
    state = SimpleNamespace(get_block_ids=held.get)
    assert tables.now(state)("a") == ([1],)
    del held["a"]
    assert tables.now(state)("a") is None


class Pool:
    """Of vLLM's block pool, the reference counts."""

    def __init__(self) -> None:
        self.blocks = [SimpleNamespace(block_id=i, uses=0) for i in range(8)]
        self.null_block = self.blocks[0]

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            block.uses += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.uses -= 1


def test_an_engine_rests_though_its_saves_are_not_reported() -> None:
    """Their blocks stay held meanwhile: the copy may be under way."""
    now = [100.0]
    slots = SimpleNamespace(
        committing=lambda _: False, take=lambda: GrantedSlot(0, 1, 200.0), commit=lambda *_: None
    )
    link: Any = SimpleNamespace(attachment=1, usable=1, readable=None, slots=slots)
    identity = SimpleNamespace(known=True, age=0)
    place: Any = SimpleNamespace(
        number=0, links={0: link}, shares={0: ()}, nbytes=[1], identity=identity
    )
    saver = Saver(
        load_settings({}),
        [Group(0, block_tokens=1, blocks=1, hash_tokens=1)],
        place,
        itertools.count(),
        LmkvStats(),
        None,
        clock=lambda: now[0],
    )
    pool: Any = Pool()
    saver.pool = pool
    request: Any = SimpleNamespace(
        request=SimpleNamespace(num_prompt_tokens=2),
        saved=[[0]],
        asked=None,
        identity=identity,
        mixed=False,
        known=True,
        age=0,
        adapter=None,
        adapter_id=0,
        keys=lambda *_: np.zeros((2, 16), np.uint8) + np.arange(2, dtype=np.uint8)[:, None],
        hints=lambda *_: None,
    )
    saver.plan(request, 2, [[1, 2]])
    assert len(saver.take_orders()) == 2
    now[0] += REPORT_SECONDS - 1
    busy = [saver.busy]
    saver.settle(WorkerReport(saved={0: 1}))
    now[0] += REPORT_SECONDS - 1
    busy.append(saver.busy)  # one was reported: the other may come
    now[0] += 2
    assert [*busy, saver.busy] == [True, True, False]
    assert [block.uses for block in pool.blocks[:3]] == [0, 0, 1]
    saver.settle(WorkerReport(saved={1: 1}))
    assert not any(block.uses for block in pool.blocks)
