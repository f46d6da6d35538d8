"""Whether a peer's actor is asked before anything is read."""

from __future__ import annotations

import math

SLOW_SECONDS = 2e-3
"""A READ of a few bytes that takes longer had to wait until the peer's process woke up."""
FAR_SECONDS = 10e-3
"""One that takes longer though the process is awake has a long way."""
HELD_SECONDS = 300.0
"""For how long that is believed: maybe the machine was busy."""
AWAKE_SECONDS = 1.0
"""For so long after it was asked a peer is awake: half of what ``process`` promises."""


class Attention:
    """What is known of one peer. Without I/O; times are monotonic seconds of the clock.

    Where the network has hardware that reads memory, nobody at the peer is needed. Where it has
    none (TCP), the peer's process sends the bytes: it looks for such wishes all the time for two
    seconds after its shard was asked for something, and 50 times a second else. So a peer that
    sleeps is asked first, which answers the question as well. One that is far away is always
    asked: either takes two round trips, but only its actor knows what is new there.
    """

    def __init__(self) -> None:
        self._asked_at = -math.inf
        self._sleepy_until = 0.0
        self._far_until = 0.0

    def asked(self, now: float) -> None:
        """Its actor is asked for something."""
        self._asked_at = now

    def wants_asking(self, now: float) -> bool:
        """Whether to ask before anything is read."""
        return now < self._far_until or (now < self._sleepy_until and not self._awake(now))

    def looked(self, now: float, seconds: float) -> str | None:
        """A READ of a few bytes has just ended; what is new about the peer, for the log."""
        awake = self._awake(now - seconds)
        if awake and seconds > FAR_SECONDS and now >= self._far_until:
            self._far_until = now + HELD_SECONDS
            return "is far away"
        if not awake and seconds > SLOW_SECONDS and now >= self._sleepy_until:
            self._sleepy_until = now + HELD_SECONDS
            return "has to be woken"
        return None

    def _awake(self, now: float) -> bool:
        return now <= self._asked_at + AWAKE_SECONDS
