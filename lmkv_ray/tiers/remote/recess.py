"""Leaving a medium in trouble alone for a while: no I/O, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0


@dataclass
class Recess:
    """After a failure nothing is tried for a pause, which grows with every further failure."""

    problem: str | None = None
    """What is wrong, and what to do."""
    _until: float = 0.0
    _pause: float = FIRST_PAUSE

    def over(self, now: float) -> bool:
        """Whether the medium may be tried."""
        return self.problem is None or now >= self._until

    def left(self, now: float) -> float:
        """Seconds until the medium may be tried."""
        return 0.0 if self.over(now) else self._until - now

    def failed(self, problem: str, now: float) -> bool:
        """It failed; whether that is news: details differ from one attempt to the next."""
        if not self.over(now):
            return False  # what was under way at the first failure
        news = self.problem is None
        self._pause = FIRST_PAUSE if self.problem is None else min(2 * self._pause, LONGEST_PAUSE)
        self._until = now + self._pause
        self.problem = problem
        return news

    def worked(self) -> None:
        """It did what it was asked."""
        self.problem = None
