"""What the policy that uses hints does with them."""

from __future__ import annotations

import random

import pytest

from lmkv_ray.hints import Hints
from lmkv_ray.policies import LRU, Hinted, Policy
from lmkv_ray.policies.reuse import ReuseTimes


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key(i: int) -> bytes:
    return i.to_bytes(16, "little")


def test_of_one_kind_the_least_recently_used_goes_first(clock: Clock) -> None:
    policy = Hinted(clock)
    for i in range(4):
        policy.added(key(i))
    assert policy.victims(9) == [key(i) for i in range(4)]


def test_priority_decides_between_equals(clock: Clock) -> None:
    policy = Hinted(clock)
    for i, priority in enumerate([0, 1, -1, 100]):
        policy.added(key(i), Hints(priority=priority))
    assert policy.victims(9) == [key(i) for i in (2, 0, 1, 3)]


def hit_rate(policy: Policy, clock: Clock, *, hints: bool) -> float:
    """Chats come back after a minute, batch jobs never do, and there are more of them."""
    rng = random.Random(0)
    held: set[bytes] = set()
    back: list[tuple[float, int]] = []
    hits = asked = 0
    for i in range(6_000):
        clock.now += 1.0
        chat = i % 4 == 0
        due = [back.pop(0)[1]] if back and back[0][0] <= clock.now else []
        if due:
            asked += 1
        for number in [*due, i]:
            if key(number) in held:
                hits += 1
                policy.touched([key(number)])
            else:
                category = "chat" if chat or number != i else "batch"
                policy.added(key(number), Hints(category=category) if hints else Hints())
                held.add(key(number))
        if chat:
            back.append((clock.now + rng.uniform(50, 70), i))
        for victim in policy.victims(max(len(held) - 40, 0)):
            policy.removed(victim)
            held.remove(victim)
    return hits / asked


def test_learns_which_category_comes_back() -> None:
    clock = Clock()
    assert hit_rate(LRU(), clock, hints=False) < 0.1
    clock = Clock()
    assert hit_rate(Hinted(clock), clock, hints=True) > 0.8


def test_chunks_of_a_session_that_came_back_are_kept_longer(clock: Clock) -> None:
    policy = Hinted(clock)
    for i in range(200):  # of ten sessions, one goes on
        clock.now += 1
        session = str(i) if i % 10 else "goes on"
        policy.added(key(i), Hints(session=session))
        if i % 10 == 0 and i:
            policy.touched([key(i - 10)])
        if len(policy) > 60:
            policy.removed(policy.victims(1)[0])
    policy.added(key(1_000), Hints(session="goes on"))
    policy.added(key(1_001), Hints(session="new"))
    order = policy.victims(len(policy))
    assert order.index(key(1_001)) < order.index(key(1_000))


def test_more_categories_than_are_told_apart(clock: Clock) -> None:
    policy = Hinted(clock)
    for i in range(1_000):
        policy.added(key(i), Hints(category=str(i)))
    assert len(policy.victims(1_000)) == 1_000
    assert len(policy._times) <= 16


def test_the_chance_falls_with_age() -> None:
    times = ReuseTimes()
    for _ in range(500):
        times.reused(20.0)
        times.given_up(4_000.0)
    chances = [times.chance(age) for age in (0, 10, 30, 1_000, 1e9)]
    assert chances == sorted(chances, reverse=True)
    assert chances[1] == pytest.approx(0.5, abs=0.02)
    assert chances[2] < 0.02


def test_recent_samples_count_more() -> None:
    times = ReuseTimes()
    for _ in range(20_000):
        times.given_up(1_000.0)
    for _ in range(40_000):
        times.reused(20.0)
    assert times.chance(10.0) > 0.75
