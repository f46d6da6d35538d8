"""The last events of a state machine, for a person who looks for the cause of a failure."""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

Event: TypeAlias = tuple[object, ...]
"""Name of the event, time in seconds (None: not known), then names and counts: nothing is formatted
before a person reads it."""

LENGTH = 1000
"""Events that a story keeps; older ones are forgotten."""


def new_story() -> deque[Event]:
    """A story without events."""
    return deque(maxlen=LENGTH)
