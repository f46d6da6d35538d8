"""An engine's slots against a real shard's state: what is published is what was written for it.

The engine's thread takes, fills and commits while the link's thread waits for answers, which may
be late or lost; the shard restarts, with the arena or with another one.
"""

from __future__ import annotations

import itertools
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmkv_ray.errors import ArenaError
from lmkv_ray.messages import Exchange, Grant, Hello, Owner
from lmkv_ray.policies import LRU
from lmkv_ray.shard import Allocator, DeltaLog, Limits, ShardState
from lmkv_ray.vllm.link.slots import GrantedSlot, News, Slots
from tests.shard.fake_arena import EXTENT_BYTES, EXTENTS, MIN_SLOT_BYTES, FakeArena

ENGINE, SPACE = Owner(pid=1, start=1), 7
LIMITS = Limits(grant_seconds=600.0, grace_seconds=600.0, holder_slots=6)
KEY = bytes(16)


def slots_of(*numbers: int) -> Slots:
    """With these granted in arena 1."""
    slots = Slots(4, lambda: None)
    slots.welcomed(1, Grant(slots=[], deadline=0.0), 0.0)
    slots.granted(Grant(slots=[*numbers], deadline=time.monotonic() + 600))
    return slots


def take(slots: Slots) -> GrantedSlot:
    granted = slots.take()
    assert granted is not None
    return granted


def test_what_is_handed_back_while_the_shard_answers_is_not_free() -> None:
    slots = slots_of(4, 5, 6)
    filling = take(slots)
    held = slots.held()
    slots.commit(filling, KEY, 8)
    slots.release(take(slots))
    slots.welcomed(1, Grant(slots=held, deadline=time.monotonic() + 600), 0.0)
    assert slots.held() == [6]
    news = slots.news()
    assert ([commit.slot for commit in news.commits], news.released) == ([4], [5])


def test_a_key_that_is_committed_twice_is_under_way_until_both_are_answered() -> None:
    slots = slots_of(4, 5)
    one, other = take(slots), take(slots)
    slots.commit(one, KEY, 8)
    first = slots.news()
    slots.commit(other, KEY, 8)
    slots.told(first)
    slots.validate()
    assert slots.committing(KEY)
    assert not slots.settled
    slots.told(slots.news())
    assert slots.settled


def test_a_slot_of_another_arena_is_not_committed_for_one_of_the_same_number() -> None:
    slots = slots_of(4)
    old = take(slots)
    slots.welcomed(2, Grant(slots=[], deadline=0.0), 0.0)
    slots.granted(Grant(slots=[4], deadline=time.monotonic() + 600))
    new = take(slots)
    slots.commit(old, KEY, 8)
    slots.release(old)
    assert slots.held() == [4]
    assert slots.news() == News(want=4)
    slots.commit(new, KEY, 8)
    assert [commit.slot for commit in slots.news().commits] == [4]


class SlotsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.keys = (number.to_bytes(16, "big") for number in itertools.count(1))
        self.pids = itertools.count(2)
        self.slots = Slots(6, lambda: None)
        self.filling: list[GrantedSlot] = []
        self.arenas: dict[int, FakeArena] = {}
        self.asked: Hello | None = None
        self.told: News | None = None
        self.attached = False
        self.numbers = itertools.count(1)
        self.number = 0
        self.late: list[Hello | Exchange] = []
        self.new_arena()

    def new_arena(self) -> None:
        self.arenas[len(self.arenas) + 1] = FakeArena()
        self.start_shard()

    @property
    def arena(self) -> FakeArena:
        """The last one."""
        return self.arenas[len(self.arenas)]

    # -- the engine's thread -----------------------------------------------------------------

    @rule(count=st.integers(1, 3))
    def take(self, count: int) -> None:
        taken = [self.slots.take() for _ in range(count)]
        self.filling += [granted for granted in taken if granted is not None]

    @precondition(lambda self: self.filling)
    @rule(which=st.integers(0, 5), good=st.sampled_from([True, True, True, False]))
    def fill(self, which: int, good: bool) -> None:
        granted = self.filling.pop(which % len(self.filling))
        arena = self.arenas[granted.arena_id]
        assert granted.slot not in arena.ready, "it is being read"
        key = next(self.keys)
        arena.content[granted.slot] = key
        if good:
            self.slots.commit(granted, key, 8)
        else:
            self.slots.release(granted)

    # -- the link's thread -------------------------------------------------------------------

    @rule(how=st.sampled_from(["answered", "answered", "answered", "lost", "late"]))
    def link(self, how: str) -> None:
        """It asks, or an answer arrives, or gets lost, or the shard has not even been asked yet."""
        if self.asked is not None:
            hello, self.asked = self.asked, None
            self.attach(hello, how)
        elif self.told is not None:
            news, self.told = self.told, None
            self.exchange(news, how)
        elif self.attached:
            self.told = self.slots.news()
        else:
            self.asked = Hello(
                engine_id="e",
                owner=ENGINE,
                space=SPACE,
                model="m",
                slot_bytes=8,
                held=self.slots.held(),
                attachment=next(self.numbers),
            )

    def attach(self, hello: Hello, how: str) -> None:
        if how == "late":
            self.late.append(hello)
            return
        grant, out = self.state.hello(hello, time.monotonic())
        self.arena.apply(out)
        if how == "answered":
            self.slots.welcomed(len(self.arenas), grant, 0.0)
            self.attached, self.number = True, hello.attachment

    def exchange(self, news: News, how: str) -> None:
        exchange = Exchange(
            engine_id="e",
            attachment=self.number,
            commits=news.commits,
            released=news.released,
            want=news.want,
        )
        if how == "late":
            self.late.append(exchange)
            self.slots.told(news)
            self.attached = False
            return
        reply, out = self.state.exchange(exchange, time.monotonic())
        self.arena.apply(out)
        self.slots.told(news)
        if how == "lost" or not reply.known:
            self.attached = False
            return
        if reply.refused:
            self.slots.return_free()
        if reply.grant is not None:
            self.slots.granted(reply.grant)

    @precondition(lambda self: self.late)
    @rule(which=st.integers(0, 3))
    def late_one_arrives(self, which: int) -> None:
        """No engine waits for its answer any more."""
        message = self.late.pop(which % len(self.late))
        try:
            if isinstance(message, Hello):
                _, out = self.state.hello(message, time.monotonic())
            else:
                _, out = self.state.exchange(message, time.monotonic())
        except ArenaError:
            return
        self.arena.apply(out)

    @rule()
    def all_is_said(self) -> None:
        """What the shard and its arena think to be the engine's is what the engine holds."""
        for _ in range(9):  # Hello, exchange, and again what a refusal hands back
            self.link("answered")
        while self.asked is not None or self.told is not None:
            self.link("answered")
        assert self.attached
        assert set(self.arena.reserved) == set(self.slots.held())

    # -- the shard ---------------------------------------------------------------------------

    @rule(how=st.sampled_from(["not", "not", "not", "not", "again", "elsewhere"]))
    def restart(self, how: str) -> None:
        if how == "again":
            self.start_shard()
        elif how == "elsewhere":
            self.new_arena()

    def start_shard(self) -> None:
        self.late = []  # they end with the process that they were sent to
        self.state = ShardState(
            Allocator(EXTENTS, EXTENT_BYTES, MIN_SLOT_BYTES, LRU),
            Owner(pid=next(self.pids), start=1),
            DeltaLog("n", next(self.pids), limit=5),
            limits=LIMITS,
        )
        out = self.state.recover(
            self.arena.sizes, self.arena.rows(), lambda owner: owner == ENGINE, time.monotonic()
        )
        self.arena.apply(out)

    @rule()
    def evict(self) -> None:
        keys = [row.key for row in self.arena.ready.values() if row.key is not None]
        self.arena.apply(self.state.evict(keys[::2]))

    @invariant()
    def slots_and_news_agree(self) -> None:
        self.slots.validate()

    @invariant()
    def what_is_published_was_written_for_it(self) -> None:
        for arena in self.arenas.values():
            for slot, row in arena.ready.items():
                assert arena.content[slot] == row.key


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)
