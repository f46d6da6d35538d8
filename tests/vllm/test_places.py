"""An engine over two nodes: what each keeps, and what a hit needs of both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lmkv_ray.keys import chunk_key
from lmkv_ray.messages import Grant, MissReason
from lmkv_ray.vllm.engine.metadata import Share
from lmkv_ray.vllm.link.shard_link import Attachment
from lmkv_ray.vllm.link.slots import Slots
from lmkv_ray.vllm.scheduler.places import Place
from tests.vllm.local_shard import LocalShard
from tests.vllm.test_identity import known_identity
from tests.vllm.two_places import MIXED, SIZE, Engine, prompt

pytestmark = pytest.mark.vllm


@pytest.fixture
def near() -> Iterator[LocalShard]:
    made = LocalShard(16 << 20)
    yield made
    made.close()


@pytest.fixture
def far() -> Iterator[LocalShard]:
    made = LocalShard(16 << 20)
    yield made
    made.close()


@pytest.fixture
def engine(near: LocalShard, far: LocalShard) -> Iterator[Engine]:
    made = Engine(near, far)
    yield made
    made.close()


SAVED, LOADED = list(range(1, 9)), list(range(11, 19))


def test_each_node_keeps_its_workers_slices_and_loads_them(
    engine: Engine, near: LocalShard, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    assert len(near.state.chunks) == len(far.state.chunks) == 8
    assert not set(near.state.chunks) & set(far.state.chunks), "other slices have other keys"
    assert 2 * near.state.chunks.nbytes == far.state.chunks.nbytes
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 8 * SIZE
    engine.load(again, 8 * SIZE, LOADED)
    assert engine.right(again, 8 * SIZE, LOADED)
    assert not engine.invalid


def test_a_place_without_layers_of_a_group_keeps_nothing_of_it(
    near: LocalShard, far: LocalShard
) -> None:
    engine = Engine(near, far, MIXED)
    try:
        engine.compute(prompt("a", 1, 8), SAVED)
        assert (len(near.state.chunks), len(far.state.chunks)) == (8, 16)
        again = prompt("b", 1, 8)
        assert engine.ask(again) == 8 * SIZE
        engine.load(again, 8 * SIZE, LOADED)
        assert engine.right(again, 8 * SIZE, LOADED)
        # Of the window the last three blocks are needed: without the sixth on the near node, a hit
        # ends before it; then on the far one the fourth of the others is lost.
        hashes = again.block_hashes
        near.evict([chunk_key(engine.places[0].namespace, hashes[5], 1)])
        assert engine.ask(prompt("c", 1, 8)) == 5 * SIZE
        far.evict([chunk_key(engine.places[1].namespace, hashes[3], 0)])
        last = prompt("d", 1, 8)
        assert engine.ask(last) == 3 * SIZE
        engine.load(last, 3 * SIZE, LOADED)
        assert engine.right(last, 3 * SIZE, LOADED)
    finally:
        engine.close()


def test_another_engine_of_the_same_shape_shares_them(
    engine: Engine, near: LocalShard, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    other = Engine(near, far)
    try:
        again = prompt("b", 1, 8)
        assert other.ask(again) == 8 * SIZE
        other.load(again, 8 * SIZE, LOADED)
        assert other.right(again, 8 * SIZE, LOADED)
    finally:
        other.close()


@pytest.mark.parametrize("loser", ["near", "far"])
def test_a_hit_is_what_all_nodes_have_and_what_one_lacks_is_saved_there(
    loser: str, engine: Engine, near: LocalShard, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    place, shard = (engine.places[0], near) if loser == "near" else (engine.places[1], far)
    hashes = prompt("", 1, 8).block_hashes
    shard.evict([chunk_key(place.namespace, hashes[i]) for i in (5, 6)])
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 5 * SIZE
    engine.load(again, 5 * SIZE, LOADED)
    assert engine.right(again, 5 * SIZE, LOADED)
    assert engine.reasons[MissReason.EVICTED] >= 2 * SIZE
    before = [s.state.counters.committed for s in (near, far)]
    engine.compute(again, LOADED, computed=5 * SIZE)
    assert len(near.state.chunks) == len(far.state.chunks) == 8
    added = [s.state.counters.committed - n for s, n in zip((near, far), before, strict=True)]
    assert added == ([2, 0] if loser == "near" else [0, 2])


def test_a_chunk_that_is_lost_after_the_answer_is_recomputed_and_not_claimed_again(
    engine: Engine, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 8 * SIZE
    hashes = again.block_hashes
    far.evict([chunk_key(engine.places[1].namespace, hashes[i]) for i in (6, 7)])
    engine.load(again, 8 * SIZE, LOADED)
    assert engine.invalid == set(LOADED[6:])
    assert engine.right(again, 6 * SIZE, LOADED)
    assert engine.ask(again) == 6 * SIZE


def test_a_silent_shard_of_another_node_costs_a_hit_and_a_bounded_wait(
    engine: Engine, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    far.frozen.set()
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 0
    engine.half.admitted(again, [LOADED], 0)
    engine.step()
    assert engine.reasons[MissReason.STAGE_TIMEOUT] == 8 * SIZE
    far.frozen.clear()


def test_a_prompt_that_is_new_to_this_node_asks_nobody(
    engine: Engine, near: LocalShard, far: LocalShard
) -> None:
    assert engine.ask(prompt("a", 1, 8)) == 0
    assert near.stages == far.stages == 0


def test_an_answer_is_asked_for_again_when_it_is_old(
    engine: Engine, far: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request may wait long for free blocks, while its chunks are replaced."""
    engine.compute(prompt("a", 1, 8), SAVED)
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 8 * SIZE
    far.evict_all()
    assert engine.match(again) == 8 * SIZE
    monkeypatch.setattr("lmkv_ray.vllm.scheduler.far_places.FRESH_SECONDS", 0.0)
    assert engine.match(again) == 0


def test_deadlines_are_told_by_the_clock_of_the_shards_node() -> None:
    slots, grant = Slots(4, lambda: None), Grant(slots=[7], deadline=time.monotonic() + 1010)
    slots.welcomed(1, grant, ahead=1000.0)
    taken = slots.take()
    assert taken is not None
    assert taken.deadline == grant.deadline
    slots.welcomed(1, grant, ahead=1020.0)
    assert slots.take() is None


def test_workers_know_the_arena_as_soon_as_one_link_has_it() -> None:
    """Else a save into a slot of this link would be nobody's, and its blocks held for ever."""
    attached = SimpleNamespace(attachment=Attachment("/arena", 7, None))
    links: Any = {0: SimpleNamespace(attachment=None), 1: attached}
    ref = Place(0, known_identity(), links, [1, 2], {0: Share((0, 0))}).arena()
    assert ref is not None
    assert ref.arena_id == 7
    attached.attachment = None
    assert Place(0, known_identity(), links, [1, 2], {0: Share((0, 0))}).arena() is None
