import errno

from lmkv_ray.tiers.breaker import Breaker
from lmkv_ray.tiers.disk.health import DiskHealth, Trouble

FULL = OSError(errno.ENOSPC, "No space left on device")
GONE = OSError(errno.ENOENT, "No such file or directory")


def test_a_full_disk_can_be_read() -> None:
    health = DiskHealth()
    assert health.failed(FULL, 0.0)
    assert (health.readable, health.writable) == (True, False)
    assert health.problem is not None
    assert "No space left" in health.problem
    assert "LMKV_DISK_CAPACITY" in health.problem


def test_only_worse_trouble_is_news() -> None:
    health = DiskHealth()
    assert health.failed(FULL, 0.0)
    assert not health.failed(FULL, 0.0)
    assert health.failed(GONE, 0.0)
    assert not health.failed(FULL, 0.0)
    assert (health.trouble, health.readable) == (Trouble.BROKEN, False)


def test_pauses_grow_to_a_bound() -> None:
    health, now, pauses = DiskHealth(Breaker(first=1, longest=5)), 0.0, []
    for _ in range(5):
        health.failed(GONE, now)
        pauses.append(pause := health.pause(now))
        assert pause is not None
        now += pause
    assert pauses == [1, 2, 4, 5, 5]


def test_an_attempt_that_fails_says_what_is_wrong_now() -> None:
    health = DiskHealth()
    health.failed(GONE, 0.0)
    health.failed(FULL, 1.0)
    assert (health.trouble, health.readable, health.pause(1.0)) == (Trouble.FULL, True, 2)
    health.mended()
    assert (health.trouble, health.problem, health.pause(1.0)) == (None, None, None)


def test_errors_that_are_no_errors_of_a_disk_break_it_too() -> None:
    health = DiskHealth()
    health.failed(ValueError("a bug"), 0.0)
    assert health.trouble is Trouble.BROKEN
    assert "a bug" in str(health.problem)


def test_slow_is_not_readable() -> None:
    health = DiskHealth()
    health.failed(TimeoutError("a read took 9 s"), 0.0)
    assert (health.trouble, health.readable) == (Trouble.SLOW, False)
