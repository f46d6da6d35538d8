"""What happened, in order: printed when a seed fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

LENGTH = 2000


class Story:
    """The last events of a run.

    Args:
        now: tells the virtual time.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._events: deque[str] = deque(maxlen=LENGTH)

    def tell(self, what: str) -> None:
        """Note an event."""
        self._events.append(f"{self._now():9.3f}  {what}")

    def __str__(self) -> str:
        return "\n".join(self._events)


class Violation(AssertionError):  # noqa: N818 (it is not an error of the simulation)
    """The cluster broke a promise."""
