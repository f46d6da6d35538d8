"""The last events of a state machine, for a person who looks for the cause of a failure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TypeAlias

Event: TypeAlias = tuple[object, ...]
"""Name of the event, time in seconds (None: not known), then names and counts: nothing is formatted
before a person reads it."""

LENGTH = 1000
"""Events that a story keeps; older ones are forgotten."""


def new_story() -> deque[Event]:
    """A story without events."""
    return deque(maxlen=LENGTH)


def lines_of(story: Iterable[Event], now: float) -> list[str]:
    """The events as a person reads them, the oldest first.

    Args:
        story: the events.
        now: monotonic seconds of the clock that the events have their times from; a line begins
            with how long ago its event was.
    """
    return [_line(event, now) for event in story]


def _line(event: Event, now: float) -> str:
    name, at, *facts = event
    ago = f"{now - at:9.1f} s ago" if isinstance(at, float | int) else " " * 15
    return " ".join([ago, str(name), *map(str, facts)])
