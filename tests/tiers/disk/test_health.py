import errno

from lmkv_ray.tiers.disk.health import Health, Trouble

FULL = OSError(errno.ENOSPC, "No space left on device")
GONE = OSError(errno.ENOENT, "No such file or directory")


def test_a_full_disk_can_be_read() -> None:
    health = Health()
    assert health.failed(FULL, 0.0)
    assert (health.readable, health.writable) == (True, False)
    assert health.problem is not None
    assert "No space left" in health.problem
    assert "LMKV_DISK_CAPACITY" in health.problem


def test_only_worse_trouble_is_news() -> None:
    health = Health()
    assert health.failed(FULL, 0.0)
    assert not health.failed(FULL, 0.0)
    assert health.failed(GONE, 0.0)
    assert not health.failed(FULL, 0.0)
    assert (health.trouble, health.readable) == (Trouble.BROKEN, False)


def test_pauses_grow_to_a_bound() -> None:
    health = Health(first=1, longest=5)
    health.failed(GONE, 0.0)
    pauses = [health.pause]
    for _ in range(4):
        health.still(GONE)
        pauses.append(health.pause)
    assert pauses == [1, 2, 4, 5, 5]


def test_what_comes_and_goes_is_tried_less_and_less() -> None:
    health = Health(first=1, longest=60)
    pauses = []
    for now in (0, 1, 2):
        health.failed(FULL, now)
        pauses.append(health.pause)
        health.mended(now)
        assert health.problem is None
    assert pauses == [1, 2, 4]
    health.failed(FULL, 2 + 60)
    assert health.pause == 1, "after a long time without, it begins anew"


def test_errors_that_are_no_errors_of_a_disk_break_it_too() -> None:
    health = Health()
    health.failed(ValueError("a bug"), 0.0)
    assert health.trouble is Trouble.BROKEN
    assert "a bug" in str(health.problem)


def test_slow_is_not_readable() -> None:
    health = Health()
    health.failed(TimeoutError("a read took 9 s"), 0.0)
    assert (health.trouble, health.readable) == (Trouble.SLOW, False)
