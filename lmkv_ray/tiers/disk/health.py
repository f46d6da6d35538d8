"""Whether the disk can be used, and when to try again: no I/O, no clock of its own."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0


class Trouble(enum.Enum):
    """How bad it is."""

    FULL = "full"
    """Nothing more can be stored; what is there can be read."""
    READ_ONLY = "read-only"
    """Nothing can be stored or removed; what is there can be read."""
    SLOW = "slow"
    """It takes so long that nobody should wait for it."""
    BROKEN = "broken"
    """Nothing can be relied on."""


_OF_ERRNO = {
    errno.ENOSPC: Trouble.FULL,
    errno.EDQUOT: Trouble.FULL,
    errno.EROFS: Trouble.READ_ONLY,
}

_MILD = (Trouble.FULL, Trouble.READ_ONLY)

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


@dataclass
class Health:
    """The state of one medium.

    Pauses between attempts grow from ``first`` to ``longest`` seconds; trouble soon after a
    recovery goes on where the last one stopped: what comes and goes is tried less and less.
    """

    first: float = FIRST_PAUSE
    longest: float = LONGEST_PAUSE
    trouble: Trouble | None = None
    problem: str | None = None
    """What is wrong, and what to do."""
    pause: float = 0.0
    """Seconds until the next attempt."""
    _mended_at: float | None = None

    @property
    def readable(self) -> bool:
        """Chunks may be looked up and read."""
        return self.trouble is None or self.trouble in _MILD

    @property
    def writable(self) -> bool:
        """Chunks may be stored."""
        return self.trouble is None

    def failed(self, error: Exception, now: float) -> bool:
        """An operation failed; True if that is news. The worst trouble counts."""
        trouble = trouble_of(error)
        if self.trouble is not None and (not self.readable or trouble in _MILD):
            return False
        if self.trouble is None:
            recent = self._mended_at is not None and now - self._mended_at < self.longest
            self.pause = min(self.pause * 2, self.longest) if recent else self.first
        self._say(trouble, error)
        return True

    def still(self, error: Exception) -> None:
        """An attempt to recover failed."""
        self.pause = min(self.pause * 2, self.longest)
        self._say(trouble_of(error), error)

    def mended(self, now: float) -> None:
        """An attempt to recover succeeded."""
        self.trouble = self.problem = None
        self._mended_at = now

    def _say(self, trouble: Trouble, error: Exception) -> None:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self.trouble = trouble
        self.problem = f"The disk is {trouble.value}: {what}. Next step: {_ADVICE[trouble]}."
