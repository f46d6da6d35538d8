"""Whether the disk can be used, and when to try again: no I/O, no clock of its own."""

from __future__ import annotations

import enum
import errno

from lmkv_ray.tiers.breaker import Breaker


class Trouble(enum.Enum):
    """How bad it is."""

    FULL = "full"
    """Nothing more can be stored; what is there can be read."""
    READ_ONLY = "read-only"
    """Nothing can be stored or removed; what is there can be read."""
    SLOW = "slow"
    """It takes so long that no reader should wait for it."""
    BROKEN = "broken"
    """Nothing can be relied on."""


_OF_ERRNO = {
    errno.ENOSPC: Trouble.FULL,
    errno.EDQUOT: Trouble.FULL,
    errno.EROFS: Trouble.READ_ONLY,
}

_MILD = (None, Trouble.FULL, Trouble.READ_ONLY)

_ADVICE = {
    Trouble.FULL: "make room on the file system, or lower LMKV_DISK_CAPACITY",
    Trouble.READ_ONLY: "mount it read-write again (the kernel's log says why it is not)",
    Trouble.SLOW: "look at the load and health of the device",
    Trouble.BROKEN: "check that LMKV_DISK_DIR exists, is writable, and its device is healthy",
}


def trouble_of(error: Exception) -> Trouble:
    """What an error of the medium means."""
    if isinstance(error, TimeoutError):
        return Trouble.SLOW
    number = error.errno if isinstance(error, OSError) else None
    return _OF_ERRNO.get(number or 0, Trouble.BROKEN)


class DiskHealth:
    """The state of one disk.

    Args:
        breaker: says when a disk in trouble is tried again.
    """

    def __init__(self, breaker: Breaker | None = None) -> None:
        self.trouble: Trouble | None = None
        self._breaker = breaker or Breaker()

    @property
    def problem(self) -> str | None:
        """What is wrong, and what to do."""
        return self._breaker.problem

    @property
    def readable(self) -> bool:
        """Chunks may be looked up and read."""
        return self.trouble in _MILD

    @property
    def writable(self) -> bool:
        """Chunks may be stored."""
        return self.trouble is None

    def pause(self, now: float) -> float | None:
        """Seconds until an attempt to mend the disk; None: there is nothing to mend."""
        return None if self.trouble is None else self._breaker.left(now)

    def failed(self, error: Exception, now: float) -> bool:
        """An operation, or an attempt to mend the disk, failed; True if that is news.

        Until the next attempt the worst trouble counts.
        """
        trouble = trouble_of(error)
        worse = self.trouble in _MILD and trouble not in _MILD
        if self.trouble is not None and not worse and not self._breaker.over(now):
            return False
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problem = f"The disk is {trouble.value}: {what}. Next step: {_ADVICE[trouble]}."
        news = self._breaker.failed(problem, now) or worse
        self.trouble, self._breaker.problem = trouble, problem
        return news

    def mended(self) -> None:
        """An attempt to mend the disk succeeded."""
        self.trouble = None
        self._breaker.worked()
