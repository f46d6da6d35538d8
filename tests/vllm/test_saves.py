"""What a request's end leaves to be saved after it: ordered when it can be, never in vLLM's way."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.metadata import WorkerReport
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.link.slots import GrantedSlot
from lmkv_ray.vllm.scheduler.save_queue import PATIENCE_SECONDS, SHARE
from lmkv_ray.vllm.scheduler.saves import Saver

GROUP = Group(0, block_tokens=1, blocks=1, hash_tokens=1)
CHUNKS, INFLIGHT, BLOCKS = 20, 4, 40


class Pool:
    """Of vLLM's block pool, the reference counts."""

    def __init__(self) -> None:
        self.num_gpu_blocks = BLOCKS
        self.blocks = [SimpleNamespace(block_id=i, uses=0) for i in range(BLOCKS)]
        self.null_block = self.blocks[0]

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            block.uses += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.uses -= 1
            assert block.uses >= 0

    @property
    def held(self) -> int:
        return sum(block.uses > 0 for block in self.blocks)


class World:
    """One engine's saver, and whom it talks to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.free = deque(range(1000, 1000 + CHUNKS))
        self.committed: list[bytes] = []
        self.returned: list[int] = []
        self.identity = SimpleNamespace(known=True, age=1)
        slots = SimpleNamespace(
            committing=lambda _: False,
            take=self._take,
            commit=lambda slot, key, *_: self.committed.append(key),
            release=lambda slot: self.returned.append(slot.slot),
        )
        self.link: Any = SimpleNamespace(attachment=1, readable=None, slots=slots)
        place: Any = SimpleNamespace(
            number=0, links={0: self.link}, shares={0: ()}, nbytes=[1], identity=self.identity
        )
        self.stats = LmkvStats()
        settings = load_settings({"max_inflight_saves": INFLIGHT})
        self.saver = Saver(
            settings, [GROUP], place, itertools.count(), self.stats, None, clock=lambda: self.now
        )
        self.pool: Any = Pool()
        self.saver.pool = self.pool

    def _take(self) -> GrantedSlot | None:
        return GrantedSlot(self.free.popleft(), 1, 600.0) if self.free else None

    def request(self, first: int = 0, chunks: int = CHUNKS) -> Any:
        """One whose chunk i is named ``first + i`` and lies in block ``first + i + 1``."""
        names = np.arange(first, first + chunks, dtype=np.uint8)[:, None]
        return SimpleNamespace(
            request=SimpleNamespace(num_prompt_tokens=chunks),
            saved=[[0]],
            asked=None,
            identity=self.identity,
            mixed=False,
            known=True,
            adapter=b"",
            adapter_id=0,
            keys=lambda *_: np.zeros((chunks, 16), np.uint8) + names,
            hints=lambda *_: None,
            table=[[*range(first + 1, first + chunks + 1)]],
        )

    def compute(self, request: Any) -> None:
        """In one step, after which the request ends."""
        self.saver.plan(request, CHUNKS, request.table)
        orders = self.saver.take_orders()
        self.saver.settle(WorkerReport(saved={order.job_id: 1 for order in orders}))
        self.saver.finish(request, CHUNKS, request.table)

    def step(self) -> int:
        """Without tokens."""
        self.saver.resume()
        orders = self.saver.take_orders()
        self.saver.settle(WorkerReport(saved={order.job_id: 1 for order in orders}))
        return len(orders)

    def rest(self) -> int:
        """Steps until there is nothing to do."""
        return next(steps for steps in itertools.count() if not (self.saver.busy and self.tick()))

    def tick(self) -> bool:
        self.step()
        self.now += 0.1
        return True

    @property
    def dropped(self) -> float:
        return float(self.stats.data.get("dropped_chunks", 0))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.rest()
    assert made.pool.held == 0, "blocks stay held"


def names(count: int) -> set[bytes]:
    return {bytes([i]) * 16 for i in range(count)}


def test_all_of_a_request_of_one_step_is_saved_after_it(world: World) -> None:
    world.compute(world.request())
    assert world.saver.busy
    assert world.pool.held == CHUNKS - INFLIGHT
    assert world.rest() == (CHUNKS - 2 * INFLIGHT) // INFLIGHT + 1
    assert set(world.committed) == names(CHUNKS)
    assert world.dropped == 0


def test_chunks_that_are_computed_before_they_have_keys_are_saved_once_they_have(
    world: World,
) -> None:
    """With asynchronous scheduling a step computes more than is known of what was generated."""
    request = world.request(chunks=2)
    request.keys = lambda *_: np.zeros((1, 16), np.uint8)
    world.saver.plan(request, 2, request.table)
    request.keys = world.request(chunks=2).keys
    world.saver.plan(request, 2, request.table)
    assert len(world.saver.take_orders()) == 2
    world.saver.settle(WorkerReport(saved=dict.fromkeys(range(2), 1)))


def test_slots_are_waited_for_and_not_for_ever(world: World) -> None:
    world.free.clear()
    world.compute(world.request())
    world.now += PATIENCE_SECONDS - 0.1
    world.free.extend([1, 2])
    assert world.step() == 2
    world.now += PATIENCE_SECONDS - 0.1
    busy = [world.step() == 0 and world.saver.busy]  # one that was saved is a sign of life
    world.now += 0.2
    world.step()
    assert [*busy, world.saver.busy] == [True, False]
    assert world.dropped == CHUNKS - 2
    assert world.saver.dropped(bytes([CHUNKS - 1]) * 16)


def test_they_make_room_when_vllm_wants_blocks(world: World) -> None:
    world.compute(world.request())
    assert world.saver.give_up()
    assert world.pool.held == INFLIGHT, "a copy under way"
    assert not world.saver.give_up()
    assert world.dropped == CHUNKS - 2 * INFLIGHT


def test_they_take_a_share_of_the_pool_at_most(world: World) -> None:
    world.free.clear()
    for first in (0, CHUNKS - 1):
        world.compute(world.request(first))
    assert world.pool.held == int(SHARE * BLOCKS)
    assert world.dropped == 2 * CHUNKS - 1 - int(SHARE * BLOCKS)


def test_what_two_requests_share_waits_once(world: World) -> None:
    world.free.clear()
    for _ in range(2):
        world.compute(world.request())
    world.free.extend(range(CHUNKS))
    world.rest()
    assert len(world.committed) == CHUNKS
    assert not world.free


def test_what_was_computed_with_other_weights_is_not_saved(world: World) -> None:
    world.compute(world.request())
    saved = len(world.committed)
    world.identity.age += 1
    world.step()
    assert not world.saver.busy
    assert len(world.committed) == saved
    assert len(world.returned) == INFLIGHT, "what was under way is not committed"


def test_without_an_arena_nothing_waits(world: World) -> None:
    world.link.attachment = None
    world.compute(world.request())
    assert not world.saver.busy
    world.link.attachment = 1
    world.compute(world.request())
    world.link.attachment = None
    world.step()
    assert not world.saver._waiting
