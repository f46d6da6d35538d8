"""Leaving a medium in trouble alone for a while: no I/O, no clock of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0


@dataclass
class Breaker:
    """After a failure nothing is tried for a pause.

    Pauses grow from one failure to the next, also where something worked in between: what comes
    and goes, or only half works, is tried less and less.

    Args:
        first: seconds of the first pause.
        longest: seconds of the longest pause; a medium that works for so long is trusted as at
            first.
    """

    first: float = FIRST_PAUSE
    longest: float = LONGEST_PAUSE
    problem: str | None = None
    """What is wrong, and what to do."""
    _until: float = -math.inf
    _pause: float = 0.0

    def over(self, now: float) -> bool:
        """Whether the medium may be tried."""
        return self.problem is None or now >= self._until

    def left(self, now: float) -> float:
        """Seconds until the medium may be tried."""
        return 0.0 if self.over(now) else self._until - now

    def failed(self, problem: str, now: float) -> bool:
        """The medium failed; whether that is news: details differ from one attempt to the next."""
        if not self.over(now):
            return False  # what was under way at the first failure
        news = self.problem is None
        recent = now < self._until + self.longest
        self._pause = min(2 * self._pause, self.longest) if recent else self.first
        self._until = now + self._pause
        self.problem = problem
        return news

    def worked(self) -> None:
        """The medium did what it was asked."""
        self.problem = None
