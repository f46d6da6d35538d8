"""How long a medium in trouble is left alone."""

from __future__ import annotations

from lmkv_ray.tiers.breaker import LONGEST_PAUSE, Breaker


def test_pauses_grow_while_it_fails_and_where_it_works_in_between() -> None:
    breaker, now, pauses = Breaker(), 100.0, []
    for attempt in range(10):
        assert breaker.over(now)
        assert breaker.failed("x", now) is (attempt % 2 == 0)
        assert not breaker.failed("what was under way", now)
        pauses.append(breaker.left(now))
        now += pauses[-1]
        if attempt % 2:
            breaker.worked()
    assert pauses == [1, 2, 4, 8, 16, 32, *[LONGEST_PAUSE] * 4]


def test_trouble_long_ago_does_not_count() -> None:
    breaker = Breaker()
    for now in (10.0, 11.0):
        breaker.failed("x", now)
    breaker.worked()
    assert breaker.over(14.0)
    assert breaker.failed("x", 13.0 + LONGEST_PAUSE)
    assert breaker.left(13.0 + LONGEST_PAUSE) == 1
