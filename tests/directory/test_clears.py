"""Which clears a shard is told of."""

from __future__ import annotations

from lmkv_ray.directory import ClearLog

A, B = b"a" * 8, b"b" * 8


def owed(log: ClearLog, cleared: int) -> list[tuple[int, bytes]]:
    return [(clear.number, clear.space) for clear in log.owed(cleared)]


def test_the_newest_of_each_space_in_order() -> None:
    log = ClearLog()
    for number, space in [(1, A), (2, B), (3, A), (4, B), (5, A)]:
        assert log.new(space, number).number == number
    assert owed(log, 0) == [(4, B), (5, A)]
    assert owed(log, 4) == [(5, A)]
    assert owed(log, 5) == []
    log.new(b"", 6)
    log.new(B, 7)
    assert owed(log, 2) == [(6, b""), (7, B)], "what was cleared with all others is over"


def test_who_has_missed_what_nobody_remembers_clears_everything() -> None:
    log = ClearLog()
    log.heard(9)
    log.new(A, 0)
    assert owed(log, 9) == [(10, A)]
    assert owed(log, 8) == [(10, b"")]


def test_a_clear_that_others_numbered_is_ordered_once() -> None:
    log = ClearLog()
    log.new(A, 5)
    assert log.knows(5)
    assert not log.knows(7)
    assert log.new(B, 7).number == 7
    assert log.knows(7)
    assert log.new(B, 6).number == 8, "of a clock that is behind: a new number"
    assert not ClearLog().knows(5)


def test_a_shard_whose_number_is_of_a_clock_that_was_ahead_misses_nothing() -> None:
    """It was silent when another life of the directory, with another clock, ordered a clear."""
    log = ClearLog()
    log.new(A, 5)
    log.new(B, 6)
    log.new(A, 7)
    log.heard(900)
    assert owed(log, 900) == [(901, A), (902, B)]
    log.heard(901)
    assert owed(log, 901) == [(902, B)]
    assert owed(log, 7) == [(902, b"")]
    assert not owed(log, 902)


def test_a_clear_that_was_in_a_store_before_is_known_if_it_is_older_than_the_log() -> None:
    """An older one was carried out as far as anybody remembers; a newer one only if it is named."""
    log = ClearLog()
    for number in range(10, 100):
        log.new(A, number)
    assert log.knows(12, old=True)
    assert not log.knows(12)
    log.new(A, 200)
    assert not log.knows(150, old=True), "of another cluster, while the store was out of our reach"


def test_a_shard_whose_number_is_of_another_cluster_misses_nothing() -> None:
    """Its disk was copied from there, and has not carried out what was ordered here before."""
    log = ClearLog()
    log.new(A, 5)
    log.new(B, 9)
    log.heard(7)
    assert owed(log, 7) == [(9, B), (10, A)]
    log.heard(9)
    assert owed(log, 9) == [(10, A)]


def test_two_caches_whose_clocks_are_behind_give_no_number_twice() -> None:
    """Both have heard of a clear from a clock that was ahead, and clear before ours gets there."""
    one, two = ClearLog(iter([1, 4]).__next__), ClearLog(iter([1, 5]).__next__)
    assert one.new(A, 900).number == two.new(A, 900).number
    assert one.new(A, 1).number != two.new(B, 1).number


def test_a_shard_that_says_a_number_without_end_does_not_use_them_up() -> None:
    log = ClearLog()
    log.new(A, 5)
    log.heard((1 << 64) - 1)
    assert log.new(B, 7).number == 7
    assert owed(log, 0) == [(5, A), (7, B)]
