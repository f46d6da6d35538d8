"""How fast this engine computes, learnt from the time between its own steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from lmkv_ray.cost import PrefillModel

MIN_TOKENS = 64
"""Steps with fewer tokens are decoding: they say nothing about prefill."""
MIN_OBSERVATIONS = 3
"""Before so many steps were seen, nothing is predicted."""


class Pace:
    """Watches steps. A step's time is known when the next one begins, if they share a request:
    else the engine may have waited for work in between.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model = PrefillModel()
        self._clock = clock
        self._began = 0.0
        self._running: frozenset[str] = frozenset()
        self._new = 0
        self._attention = 0.0

    def step(self, work: Iterable[tuple[str, int, int]]) -> None:
        """A step begins.

        Args:
            work: (request, tokens computed in this step, tokens computed before).
        """
        now = self._clock()
        rows = list(work)
        running = frozenset(request for request, _, _ in rows)
        if self._new >= MIN_TOKENS and not running.isdisjoint(self._running):
            past = self._attention / self._new - self._new / 2
            self.model.observe(self._new, max(past, 0.0), now - self._began)
        self._began, self._running = now, running
        self._new = sum(new for _, new, _ in rows)
        self._attention = sum(new * (past + new / 2) for _, new, past in rows)

    def remaining(self, tokens: int, begin: int, chunk: int, chunks: int) -> list[float]:
        """Expected seconds of prefill once k further chunks are there, for k = 0 to ``chunks``.

        Args:
            tokens: the prompt's length in tokens.
            begin: of them are there already.
            chunk: tokens in a chunk.
            chunks: that are missing.

        Returns:
            ``chunks + 1`` values; none if too little is known.
        """
        if self.model.observations < MIN_OBSERVATIONS:
            return []
        past = np.minimum(begin + chunk * np.arange(chunks + 1), tokens)
        seconds: list[float] = self.model.seconds(tokens - past, past).tolist()
        return seconds
