"""What strangers say, from a request to the shard: it harms nobody but them.

A batch of commits goes the whole way (hints, exchange, bytes, exchange, state, arena), some of them
as good as they should be, some as bad as they can be made, also behind the edge where hints are
checked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.messages import (
    Commit,
    Exchange,
    Hello,
    Owner,
    decode_exchange,
    encode,
    encode_exchange,
)
from lmkv_ray.policies import LRU, Policy, make_policy
from lmkv_ray.shard import Allocator, DeltaLog, Limits, ShardState
from lmkv_ray.vllm.scheduler.wishes import Wishes, WishReader
from tests.shard.fake_arena import EXTENT_BYTES, EXTENTS, MIN_SLOT_BYTES, FakeArena

SPACE, SLOT_BYTES = 7, 8
CAPACITY = EXTENTS * EXTENT_BYTES // SLOT_BYTES
BATCH = 6

numbers = st.floats() | st.integers() | st.just(2**70) | st.sampled_from([1e999, -1e999, math.nan])
text = st.text(st.characters(exclude_categories=[])) | st.just("\ud800") | st.just("x" * 3000)
values = st.none() | st.booleans() | numbers | text | st.lists(numbers, max_size=2)


def read(params: Any) -> Hints:
    return WishReader(lambda: None).read({"lmkv": params}).hints()


at_the_edge = st.builds(read, st.dictionaries(st.sampled_from(Wishes.__struct_fields__), values))
behind_it = st.builds(
    Hints,
    after=st.binary(max_size=17),
    deadline=st.none() | numbers,
    priority=st.integers() | st.sampled_from([2**70, -(2**63), 2**63 - 1]),
    session=text,
    category=text,
    pinned=st.booleans(),
    space=st.integers(-1, 2**64),
)
hints = at_the_edge | behind_it
names = st.sampled_from(["arc", "hinted", "lru", "s3fifo"])
bad_commits = st.builds(
    Commit,
    slot=st.integers(-(2**63), 2**63) | st.integers(0, CAPACITY),
    key=st.binary(max_size=17) | st.just(bytes(16)),
    nbytes=st.integers(-(2**40), 2**64),
    hints=hints,
)


class World:
    """A shard without memory, and one engine."""

    def __init__(self, make: Any) -> None:
        self.arena = FakeArena()
        allocator = Allocator(EXTENTS, EXTENT_BYTES, MIN_SLOT_BYTES, make)
        owner, limits = Owner(pid=1, start=1), Limits(grant_seconds=1e6)
        self.state = ShardState(allocator, owner, DeltaLog("n", 1), limits=limits)
        self.allocator = allocator
        engine = Owner(pid=2, start=1)
        hello = Hello(
            engine_id="e", owner=engine, space=SPACE, model="m", slot_bytes=SLOT_BYTES, held=[]
        )
        self.arena.apply(self.state.hello(hello, time.monotonic())[1])
        self.keys = self._names()

    def grant(self, n: int) -> list[int]:
        """As an engine asks; it holds nothing else."""
        reply, out = self.state.exchange(Exchange(engine_id="e", want=n), time.monotonic())
        self.arena.apply(out)
        return reply.grant.slots if reply.grant else []

    def send(self, commits: list[Commit], **other: Any) -> None:
        """All the way, and see that the shard and its arena agree about every slot."""
        data = encode_exchange(Exchange(engine_id="e", commits=commits, **other))
        _, out = self.state.exchange(decode_exchange(data), time.monotonic())
        self.arena.apply(out)
        self.check()

    def save(self, n: int, hints: Hints = NO_HINTS) -> list[bytes]:
        """Chunks as they should be."""
        slots = self.grant(n)
        keys = [next(self.keys) for _ in slots]
        self.send([self.good(s, k, hints) for s, k in zip(slots, keys, strict=True)])
        return keys

    @staticmethod
    def good(slot: int, key: bytes, hints: Hints = NO_HINTS) -> Commit:
        return Commit(slot=slot, key=key, nbytes=SLOT_BYTES, hints=hints)

    def check(self) -> None:
        held = [*self.state._leases.holders["e"].leases]
        assert sorted(held) == sorted(self.arena.reserved), "a slot is neither free nor anybody's"
        assert {row.key for row in self.arena.ready.values()} == set(self.state.chunks)
        free = sum(len(size.free) for size in self.state._extents.classes.values())
        cut = sum(EXTENT_BYTES // size for size in self.arena.sizes if size)
        assert free + len(held) + len(self.state.chunks) == cut

    @staticmethod
    def _names() -> Iterator[bytes]:
        number = 0
        while True:
            number += 1
            yield number.to_bytes(16, "little")


@settings(max_examples=300, deadline=None)
@given(
    name=names,
    hints=st.lists(hints, min_size=BATCH, max_size=BATCH),
    bad=st.lists(bad_commits, max_size=3),
)
def test_a_batch_loses_nothing_that_is_good(
    name: str, hints: list[Hints], bad: list[Commit]
) -> None:
    world = World(lambda: make_policy(name, tenant_share=0.5))
    slots = world.grant(BATCH)
    keys = [next(world.keys) for _ in slots]
    with_hints = [world.good(s, k, h) for s, k, h in zip(slots, keys, hints, strict=True)]
    plain = [world.good(s, k) for s, k in zip(slots, keys, strict=True)]
    # Half of the slots are committed with strange hints, half as they should be.
    strange = [commit for commit in bad if commit.slot not in slots]
    half = BATCH // 2
    world.send([*strange, *with_hints[:half], *plain[half:]], released=[], touched=b"odd")
    assert set(keys[half:]) <= set(world.state.chunks)
    for commit in with_hints[:half]:  # those that can be sent are stored, whatever they say
        try:
            encode(commit)
        except (ValueError, OverflowError):
            continue
        assert commit.key in world.state.chunks
    for _ in range(3 * CAPACITY // BATCH):  # and the shard goes on
        assert set(world.save(BATCH)) <= set(world.state.chunks)
    assert world.allocator.policy_errors == 0


def test_a_commit_that_cannot_be_read_costs_itself_only() -> None:
    world = World(LRU)
    one, two, three = world.grant(3)
    keys = [next(world.keys) for _ in range(3)]
    message = Exchange(
        engine_id="e", commits=[world.good(s, k) for s, k in zip((one, two), keys, strict=False)]
    )
    fields = msgspec.msgpack.decode(encode(message))
    for bad in ([three], [three, keys[2], "many"], [three, keys[2], 8, [b"", None, "high"]], 5):
        fields[Exchange.__struct_fields__.index("commits")].append(bad)
    exchange = decode_exchange(msgspec.msgpack.encode(fields))
    assert exchange.commits == message.commits
    assert exchange.released == [three] * 3
    _, out = world.state.exchange(exchange, time.monotonic())
    world.arena.apply(out)
    world.check()
    assert set(world.state.chunks) == set(keys[:2])


class Fails(LRU):
    """Raises where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: set[str] = set()

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        super().added(key, hints)
        if hints.category == "bad":
            raise ArithmeticError("added")

    def removed(self, key: bytes) -> None:
        super().removed(key)
        if "removed" in self.failing:
            raise ArithmeticError("removed")

    def touched(self, keys: Any) -> None:
        if "touched" in self.failing:
            raise ArithmeticError("touched")
        super().touched(keys)

    def victims(self, n: int) -> list[bytes]:
        if "victims" in self.failing:
            raise ArithmeticError("victims")
        return [b"nobody" * 3][:n] if "lies" in self.failing else super().victims(n)


@pytest.mark.parametrize("failing", ["", "removed", "touched", "victims", "lies"])
def test_a_policy_that_fails_costs_a_chunk_or_the_order(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Fails()
    made: list[Policy] = []

    def make() -> Policy:
        made.append(policy)
        return policy

    world = World(make)
    policy.failing = {failing}
    good, bad = world.save(3), Hints(category="bad")
    slots, keys = world.grant(3), [next(world.keys) for _ in range(3)]
    with_one = [
        world.good(s, k, h) for s, k, h in zip(slots, keys, (NO_HINTS, bad, NO_HINTS), strict=True)
    ]
    world.send(with_one, touched=good[0])
    assert set(world.state.chunks) == {*good, keys[0], keys[2]}
    for _ in range(3 * CAPACITY // BATCH):
        last = world.save(BATCH)
        assert set(last) <= set(world.state.chunks)
    assert world.allocator.policy_errors > (failing != "")
    assert len(caplog.records) == 1, "one line for all of them"


def test_requests_pin_no_more_than_their_share_of_the_arena() -> None:
    world = World(LRU)
    for _ in range(CAPACITY):
        world.save(2, Hints(pinned=True))
    by_requests = world.state.chunks.pinned()
    assert len(by_requests) == int(CAPACITY * 0.125)
    mine = world.save(3)
    assert world.state.chunks.pin(mine, True) == mine
    for _ in range(CAPACITY):
        world.save(2, Hints(pinned=True))
    assert set(mine) <= set(world.state.chunks)
    world.state.chunks.pin(by_requests, False)
    assert len(world.state.chunks.pinned()) == 3
    world.save(2, Hints(pinned=True))
    assert len(world.state.chunks.pinned()) == 5
