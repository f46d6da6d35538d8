"""Whose a chunk is, and what follows it: shares, clears, keys at rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmkv_ray.errors import ConfigError
from lmkv_ray.fetch import Failure
from lmkv_ray.hints import Hints
from lmkv_ray.keys import key_list
from lmkv_ray.messages import Clear, Commit, Exchange, Hello, Owner
from lmkv_ray.policies import LRU, make_policy
from lmkv_ray.shard import Allocator, DeltaLog, Publish, ShardState
from lmkv_ray.tenants import (
    clear_bytes,
    covering,
    covers,
    namespace_of,
    overlap,
    space_of,
    tenant_of,
    tenant_within,
)
from lmkv_ray.tiers.cipher import AesGcm
from lmkv_ray.tiers.clears import PendingClears
from lmkv_ray.tiers.format import Label
from tests.tiers.harness import HARNESSES, fetch, slots, some_keys, store

NAMESPACE, ANOTHER = space_of(b"n" * 16), space_of(b"m" * 16)
ALICE, BOB, NO_NODE = (NAMESPACE | tenant_of(salt) for salt in ("alice", "bob", ""))
KEYS = some_keys(6)


def test_a_space_is_a_namespace_and_a_tenant_in_it() -> None:
    assert len({ALICE, BOB, NO_NODE, ANOTHER | tenant_of("alice")}) == 4
    assert {namespace_of(space) for space in (ALICE, BOB, NO_NODE, NAMESPACE)} == {NAMESPACE}
    assert 0 < tenant_of("") < 1 << 32, "requests without a salt are a tenant too"
    assert space_of(bytes(16)) > 0
    assert tenant_of("\udcff") != tenant_of(""), "what a request carries may be any text"
    assert ALICE < 1 << 64


def test_what_covers_what() -> None:
    for which in (None, NAMESPACE, tenant_of("alice"), ALICE):
        assert covers(which, ALICE)
        assert which in covering(ALICE)
    for which in (0, ANOTHER, tenant_of("bob"), BOB, ANOTHER | tenant_of("alice")):
        assert not covers(which, ALICE)
    assert len(covering(ALICE)) == 4
    assert covering(0) == (None,), "an engine that knows no namespace yet has no chunks"
    assert not covers(ALICE, NAMESPACE)
    assert overlap(ALICE, NAMESPACE)
    assert overlap(None, NAMESPACE)
    assert overlap(tenant_of("alice"), NAMESPACE), "neither covers the other"
    assert not overlap(tenant_of("bob"), ALICE)
    assert not overlap(0, NAMESPACE)
    assert not overlap(ALICE, ANOTHER)


def test_an_engine_names_only_tenants_of_its_own_namespace() -> None:
    assert tenant_within(NAMESPACE, ALICE) == ALICE
    for strange in (0, -1, ANOTHER | tenant_of("alice"), 1 << 64, ALICE + (1 << 64)):
        assert tenant_within(NAMESPACE, strange) == NAMESPACE
    assert tenant_within(0, ALICE) == 0


def test_what_a_clear_names() -> None:
    assert clear_bytes() == b""
    digest = b"n" * 16
    for namespace in (digest.hex(), digest.hex()[:8]):
        assert int.from_bytes(clear_bytes(namespace), "little") == NAMESPACE
        assert int.from_bytes(clear_bytes(namespace, "alice"), "little") == ALICE
        assert int.from_bytes(clear_bytes(namespace, ""), "little") == NO_NODE
    assert int.from_bytes(clear_bytes(salt="alice"), "little") == tenant_of("alice")
    for wrong in ("6e6e6e", "nonsense", "6e6e6e6"):
        with pytest.raises(ConfigError, match="namespace"):
            clear_bytes(wrong)
    assert Clear(number=1, space=clear_bytes(salt="alice")).space


@pytest.fixture
def state() -> ShardState:
    owner = Owner(pid=1, start=1)
    allocator = Allocator(4, 64, 8, LRU)
    state = ShardState(allocator, owner, DeltaLog("n", 1))
    hello = Hello(engine_id="e", owner=owner, space=NAMESPACE, model="m", slot_bytes=8, held=[])
    state.hello(hello, 0)
    return state


def save(state: ShardState, keys: list[bytes], spaces: list[int]) -> list[Publish]:
    reply, _ = state.exchange(Exchange(engine_id="e", want=len(keys)), 0)
    assert reply.grant is not None
    commits = [
        Commit(slot=slot, key=key, nbytes=5, hints=Hints(space=space))
        for slot, key, space in zip(reply.grant.slots, keys, spaces, strict=True)
    ]
    _, out = state.exchange(Exchange(engine_id="e", commits=commits), 0)
    return [step for step in out if isinstance(step, Publish)]


def test_a_shard_knows_whose_each_chunk_is(state: ShardState) -> None:
    keys = key_list(KEYS)
    given = [ALICE, BOB, NO_NODE, 0, ANOTHER | tenant_of("alice"), ALICE]
    expected = [ALICE, BOB, NO_NODE, NAMESPACE, NAMESPACE, ALICE]
    [publish] = save(state, keys, given)
    assert dict(zip(publish.keys, publish.spaces, strict=True)) == dict(
        zip(keys, expected, strict=True)
    ), "the arena, and so a successor, knows it too"
    assert [state.chunks.space(key) for key in keys] == expected


@pytest.mark.parametrize(
    ("which", "left"),
    [
        (ALICE, [1, 2, 3]),
        (tenant_of("alice"), [1, 2, 3]),
        (NO_NODE, [0, 1, 3]),
        (NAMESPACE, []),
        (ANOTHER, [0, 1, 2, 3]),
        (0, [0, 1, 2, 3]),
        (None, []),
    ],
)
def test_a_clear_follows_the_tenant(state: ShardState, which: int | None, left: list[int]) -> None:
    keys = key_list(KEYS)[:4]
    save(state, keys, [ALICE, BOB, NO_NODE, 0])
    reply, _ = state.exchange(Exchange(engine_id="e", want=1), 0)
    assert reply.grant is not None
    state.clear(which)
    assert [i for i, key in enumerate(keys) if key in state.chunks] == left
    # What was being filled began before the clear.
    commit = Commit(slot=reply.grant.slots[0], key=b"k" * 16, nbytes=5, hints=Hints(space=ALICE))
    reply, _ = state.exchange(Exchange(engine_id="e", commits=[commit]), 0)
    assert bool(reply.refused) == (which not in (ANOTHER, 0))


def test_shares_follow_the_tenant() -> None:
    """A flood of one salt leaves another salt of the same namespace what it holds."""
    policy = make_policy("lru", tenant_share=0.5)
    for i in range(2):
        policy.added(b"bob%13d" % i, Hints(space=BOB))
    for i in range(20):
        policy.added(b"alice%11d" % i, Hints(space=ALICE))
    assert all(key.startswith(b"alice") for key in policy.victims(9))


def test_keys_at_rest_follow_the_tenant() -> None:
    cipher, out = AesGcm(b"m" * 32), memoryview(bytearray(116))
    chunk = np.arange(100, dtype=np.uint8)
    cipher.seal(Label(b"k" * 16, ALICE, 100), bytes(12), chunk, out)
    got = np.zeros(100, np.uint8)
    assert cipher.open(Label(b"k" * 16, ALICE, 100), bytes(12), out, got.data)
    for other in (BOB, NAMESPACE, ANOTHER | tenant_of("alice")):
        assert not cipher.open(Label(b"k" * 16, other, 100), bytes(12), out, got.data)


@pytest.mark.parametrize("kind", sorted(HARNESSES))
async def test_a_clear_follows_the_tenant_below_memory(kind: str, tmp_path: Path) -> None:
    harness = HARNESSES[kind](tmp_path)
    tier: Any = await harness.open()
    spaces = [ALICE, BOB, NO_NODE, ANOTHER | tenant_of("alice"), ANOTHER | tenant_of("bob"), ALICE]
    for i, space in enumerate(spaces):
        assert await store(tier, KEYS[i : i + 1], space=space) == [True]

    async def left() -> list[int]:
        outcomes = await fetch(tier, KEYS, slots(len(KEYS)))
        assert {o.failure for o in outcomes} <= {None, Failure.MISSING}
        return [o.position for o in outcomes if o.ok]

    assert await left() == [0, 1, 2, 3, 4, 5]
    await tier.clear(BOB, 1)
    assert await left() == [0, 2, 3, 4, 5]
    await tier.clear(tenant_of("alice"), 2)
    assert await left() == [2, 4]
    assert await store(tier, KEYS[:1], space=ALICE) == [True]
    assert await left() == [0, 2, 4]
    await tier.clear(NAMESPACE, 3)
    assert await left() == [4]
    assert not (await tier.lookup(KEYS[:1], 5)).any()
    await tier.close()
    again: Any = await harness.open()
    assert [o.ok for o in await fetch(again, KEYS, slots(len(KEYS)))] == [i == 4 for i in range(6)]
    await again.close()


def test_a_pending_clear_hides_what_it_covers() -> None:
    pending = PendingClears()
    pending.add(tenant_of("alice"), 1)
    assert pending.covers(ALICE)
    assert pending.covers(ANOTHER | tenant_of("alice"))
    assert not pending.covers(BOB)
    pending.add(NAMESPACE, 2)
    assert pending.covers(BOB)
