"""Whether a peer's actor is asked before anything is read."""

from __future__ import annotations

import math

SLOW_SECONDS = 2e-3
"""A READ of a few bytes that takes longer had to wait until the peer's process woke up."""
HELD_SECONDS = 300.0
"""For how long that is believed: maybe the machine was busy."""
AWAKE_SECONDS = 1.0
"""For so long after it was asked a peer is awake: half of what ``process`` promises."""


class Attention:
    """What is known of one peer. Without I/O; times are ``time.monotonic()`` seconds.

    Where the network has hardware that reads memory, nobody at the peer is needed. Where it has
    none (TCP), the peer's process sends the bytes: it looks for such wishes all the time for two
    seconds after its shard was asked for something, and 50 times a second else. So a peer that
    sleeps is asked first, which answers the question as well.
    """

    def __init__(self) -> None:
        self._asked_at = -math.inf
        self._sleepy_until = 0.0

    def asked(self, now: float) -> None:
        """Its actor is asked for something."""
        self._asked_at = now

    def wants_asking(self, now: float) -> bool:
        """Whether to ask before anything is read."""
        return now < self._sleepy_until and not self._awake(now)

    def looked(self, now: float, seconds: float) -> bool:
        """A READ of a few bytes has just ended; whether that is news."""
        news = seconds > SLOW_SECONDS and now >= self._sleepy_until and not self._awake(now)
        if news:
            self._sleepy_until = now + HELD_SECONDS
        return news

    def _awake(self, now: float) -> bool:
        return now <= self._asked_at + AWAKE_SECONDS
