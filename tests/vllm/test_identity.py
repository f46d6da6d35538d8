"""Namespaces that are not known yet, or are replaced while the engine runs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lmkv_ray.keys import Namespace, chunk_key, key_list
from lmkv_ray.tenants import namespace_of
from lmkv_ray.vllm.identity.ages import Identity
from tests.vllm.conftest import wait_for
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

SAVED, LOADED = list(range(1, 9)), list(range(11, 19))


def namespace(**fields: Any) -> Namespace:
    named: dict[str, Any] = dict.fromkeys(
        ["model", "weights", "dtype", "cache_dtype", "layout", "hash_algorithm", "parallel"], ""
    )
    return Namespace(**(named | {"engine": "", "block_tokens": 16, "chunk_tokens": 16} | fields))


def known_identity() -> Identity:
    identity = Identity([namespace()])
    identity.adopt()
    return identity


def test_an_age_begins_when_other_namespaces_are_adopted_and_only_then() -> None:
    identity = Identity([namespace(), namespace(parallel="b")], pending=["weights"])
    assert not identity.adopt()
    assert (identity.known, identity.age, identity.space(1)) == (False, 0, 0)
    identity.learn(weights="w")
    assert (identity.known, identity.namespaces) == (False, ()), "the engine's thread adopts it"
    assert identity.adopt()
    assert (identity.known, identity.age) == (True, 1)
    expected = [namespace(weights="w"), namespace(weights="w", parallel="b")]
    assert list(identity.namespaces) == [value.digest() for value in expected]
    identity.doubt("weights")
    assert not identity.adopt()
    assert (identity.known, identity.age) == (False, 1)
    identity.learn(weights="w")
    assert not identity.adopt(), "it is what it was"
    assert (identity.known, identity.age) == (True, 1)
    identity.learn(weights="other")
    assert identity.adopt()
    assert identity.age == 2


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
def engine(near: LocalShard, far: LocalShard) -> Iterator[Any]:
    from tests.vllm.two_places import Engine

    made = Engine(near, far)
    yield made
    made.close()


def spaces(shard: LocalShard) -> set[int]:
    return {holder.space for holder in shard.state._leases.engines().values()}


def owners(shard: LocalShard, keys: set[bytes]) -> set[int]:
    """The namespaces of these chunks."""
    return {namespace_of(shard.state.chunks.space(key) or 0) for key in keys}


def replace(engine: Any, shards: list[LocalShard], value: str) -> Identity:
    """Other weights are learnt, and all shards have heard of it."""
    identity: Identity = engine.places[0].identity
    identity.learn(weights=value)
    engine.step()
    for number, shard in enumerate(shards):
        wait_for(lambda s=shard, n=number: spaces(s) == {identity.space(n)})  # type: ignore[misc]
        wait_for(lambda n=number: len(engine.places[n].link.slots) >= 16)  # type: ignore[misc]
    return identity


def test_while_it_is_not_known_nothing_is_found_and_nothing_saved(
    engine: Any, near: LocalShard, far: LocalShard
) -> None:
    from tests.vllm.two_places import SIZE, prompt

    engine.compute(prompt("a", 1, 8), SAVED)
    identity: Identity = engine.places[0].identity
    identity.doubt("weights")
    request = prompt("b", 1, 8)
    assert engine.ask(request) == 0
    engine.half.admitted(request, [LOADED], 0)
    engine.step()
    assert engine.reasons["identity_pending"] == 8 * SIZE
    engine.compute(prompt("c", 2, 8), SAVED)
    assert len(near.state.chunks) == len(far.state.chunks) == 8
    identity.learn(weights="dummy 0")
    assert engine.ask(prompt("d", 1, 8)) == 8 * SIZE, "it is what it was"


def test_after_a_replacement_the_old_is_not_found_and_both_are_kept(
    engine: Any, near: LocalShard, far: LocalShard
) -> None:
    from tests.vllm.two_places import SIZE, prompt

    engine.compute(prompt("a", 1, 8), SAVED)
    before = set(near.state.chunks)
    identity = replace(engine, [near, far], "new")
    assert engine.ask(prompt("b", 1, 8)) == 0
    engine.compute(prompt("c", 1, 8), SAVED)
    assert len(near.state.chunks) == len(far.state.chunks) == 16
    new = set(near.state.chunks) - before
    assert owners(near, new) == {identity.space(0)}
    assert owners(near, before) != {identity.space(0)}
    assert engine.ask(prompt("d", 1, 8)) == 8 * SIZE
    replace(engine, [near, far], "dummy 0")
    assert engine.ask(prompt("e", 1, 8)) == 8 * SIZE, "the old weights are back"


def test_saves_under_way_and_requests_that_run_are_of_no_age(
    engine: Any, near: LocalShard, far: LocalShard
) -> None:
    from tests.vllm.two_places import SIZE, prompt

    running, waiting = prompt("a", 1, 8), prompt("w", 3, 8)
    engine.half.on_new_request(running)
    engine.half.on_new_request(waiting)
    output: Any = SimpleNamespace(
        total_num_scheduled_tokens=4 * SIZE,
        num_scheduled_tokens={"a": 4 * SIZE},
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: [SAVED]),
    )
    orders = engine.half.step(output)
    assert orders.saves, "under way"
    running.num_computed_tokens = 4 * SIZE
    replace(engine, [near, far], "new")
    held = [lease for h in near.state._leases.engines().values() for lease in h.leases]
    ordered = [save.slot for save in orders.saves if save.place == 0]
    assert set(ordered) <= set(held), "a worker may be writing into them: they are nobody else's"
    for worker in engine.workers:
        worker.begin_saves(orders)

    def saved() -> bool:
        engine.step()
        return not engine.half.saving

    wait_for(saved)
    engine.step(running, 4 * SIZE, SAVED)
    assert not engine.half.saving, "its first half was computed before"
    engine.half.on_finished(running, [SAVED])
    assert not near.state.chunks
    assert not far.state.chunks
    assert engine.match(waiting) == 0
    engine.compute(waiting, SAVED)
    assert len(near.state.chunks) == len(far.state.chunks) == 8
    assert all(block.uses == 0 for block in engine.pool.blocks)


@pytest.mark.parametrize("counted", [True, False])
def test_what_was_computed_while_weights_were_others_for_a_moment_is_not_saved(
    engine: Any, near: LocalShard, far: LocalShard, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    import torch

    from tests.vllm.two_places import SIZE, prompt

    monkeypatch.setattr(
        "lmkv_ray.vllm.worker.half.REST_SECONDS", 0.0
    )  # it takes longer to write them

    def scale(factor: float) -> None:
        weight = engine.model.weight
        with torch.no_grad():
            (weight if counted else weight.data).mul_(factor)

    def compute(request: Any, tokens: int) -> None:
        engine.step(request, tokens, SAVED)
        request.num_computed_tokens += tokens

    running, later = prompt("a", 1, 8), prompt("b", 2, 8)
    engine.half.on_new_request(running)
    compute(running, 4 * SIZE)
    wait_for(lambda: engine.step() or not engine.half.saving)
    scale(2.0)
    compute(running, 3)  # completes no chunk: there is nothing to be saved
    scale(0.5)
    for _ in range(4):
        compute(running, SIZE)
    engine.half.on_finished(running, [SAVED])
    wait_for(lambda: engine.step() or not engine.half.saving)
    wait_for(lambda: engine.places[0].link.slots.settled)
    assert len(near.state.chunks) == 4
    engine.compute(later, SAVED)
    assert len(near.state.chunks) == 12, "the weights are what they were"


def test_what_continues_a_hit_in_an_old_prefix_cache_is_not_saved(
    engine: Any, near: LocalShard, far: LocalShard
) -> None:
    from tests.vllm.two_places import SIZE, prompt

    engine.compute(prompt("a", 1, 4), SAVED)
    engine.pool.cached_block_hash_to_block[b"old"] = "block"
    replace(engine, [near, far], "new")
    kept = len(near.state.chunks)

    def continues(name: str) -> None:
        request = prompt(name, 1, 8)
        engine.half.on_new_request(request)
        assert engine.match(request, 4 * SIZE) == 0
        request.num_computed_tokens = 4 * SIZE
        engine.step(request, 4 * SIZE, SAVED)
        engine.half.on_finished(request, [SAVED])

        def saved() -> bool:
            engine.step()
            return not engine.half.saving

        wait_for(saved)
        wait_for(lambda: engine.places[0].link.slots.settled)

    continues("b")
    assert len(near.state.chunks) == kept
    engine.pool.cached_block_hash_to_block = {b"new": "block"}
    continues("c")
    assert len(near.state.chunks) > kept


def test_keys_of_a_request_are_made_anew(engine: Any) -> None:
    from tests.vllm.two_places import GROUP, prompt

    request = prompt("a", 1, 2)
    engine.half.on_new_request(request)
    tracked = engine.half._tracked["a"]
    identity: Identity = engine.places[0].identity
    before = key_list(tracked.keys(GROUP))
    identity.learn(weights="new")
    assert key_list(tracked.keys(GROUP)) == before, "only the engine's thread goes over to it"
    engine.step()
    made = [chunk_key(identity.namespaces[0], value) for value in request.block_hashes]
    assert key_list(tracked.keys(GROUP)) == made != before
