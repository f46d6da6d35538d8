from lmkv_ray.shard import DeltaLog

A, B = b"a" * 16, b"b" * 16


def test_a_new_life_starts_with_everything() -> None:
    log = DeltaLog("n", epoch=7)
    log.added([A])
    first = log.take([A, B])
    assert (first.epoch, first.seq, first.snapshot, first.added) == (7, 1, True, A + B)
    assert not log


def test_changes_are_batched_and_the_last_one_counts() -> None:
    log = DeltaLog("n", epoch=1)
    log.take([])
    log.added([A, B])
    log.removed([A])
    delta = log.take([B])
    assert (delta.seq, delta.snapshot, delta.added, delta.removed) == (2, False, B, A)


def test_heartbeats_are_numbered_too() -> None:
    log = DeltaLog("n", epoch=1)
    assert [log.take([]).seq for _ in range(3)] == [1, 2, 3]


def test_too_many_changes_become_a_snapshot() -> None:
    log = DeltaLog("n", epoch=1, limit=4)
    log.take([])
    keys = [bytes([i]) * 16 for i in range(5)]
    log.added(keys)
    delta = log.take(keys)
    assert delta.snapshot
    assert delta.added == b"".join(keys)
