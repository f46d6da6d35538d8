"""How long a store in trouble is left alone."""

from __future__ import annotations

from lmkv_ray.tiers.remote.recess import LONGEST_PAUSE, Recess


def test_pauses_grow_while_it_fails_and_where_it_works_in_between() -> None:
    recess, now, pauses = Recess(), 100.0, []
    for attempt in range(10):
        assert recess.over(now)
        assert recess.failed("x", now) is (attempt % 2 == 0)
        assert not recess.failed("what was under way", now)
        pauses.append(recess.left(now))
        now += pauses[-1]
        if attempt % 2:
            recess.worked()
    assert pauses == [1, 2, 4, 8, 16, 32, *[LONGEST_PAUSE] * 4]


def test_trouble_long_ago_does_not_count() -> None:
    recess = Recess()
    for now in (10.0, 11.0):
        recess.failed("x", now)
    recess.worked()
    assert recess.over(14.0)
    assert recess.failed("x", 13.0 + LONGEST_PAUSE)
    assert recess.left(13.0 + LONGEST_PAUSE) == 1
