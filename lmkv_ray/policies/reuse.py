"""How soon chunks of one kind are used again."""

from __future__ import annotations

import math

PER_OCTAVE = 2
BUCKETS = 44
"""Ages up to 2**(44 / 2) seconds: 48 days."""
WINDOW = 300.0
"""Seconds: a chunk is worth the chance that it is used within them."""
REFRESH = 256
"""Samples between two looks at the histogram, once there are some."""
FORGET = 1 << 14
"""Samples after which the old ones count half."""


def bucket_of(age: float) -> int:
    """The bucket of an age in seconds: half an octave wide, from one second on."""
    return min(int(math.log2(age) * PER_OCTAVE) + 1, BUCKETS - 1) if age >= 1 else 0


_WITHIN_WINDOW = [
    bucket_of(WINDOW + (2 ** ((bucket - 0.5) / PER_OCTAVE) if bucket else 0.5)) + 1
    for bucket in range(BUCKETS)
]
"""For each bucket of ages, the first that lies beyond the window."""


class ReuseTimes:
    """Times from one use of a chunk to the next, of all chunks of one kind.

    After J. Wang et al.: KVCache cache in the wild, ATC 2025 (arXiv 2506.02634): what will be
    used again is predicted well by the kind of traffic and the time since the last use. They fit
    an exponential distribution; this keeps a histogram, in which recent samples count more.
    """

    def __init__(self) -> None:
        self._reused = [1.0 / BUCKETS] * BUCKETS
        self._never = [1.0 / BUCKETS] * BUCKETS
        self._samples = 0
        self._next_survey = 1
        self._chances = self._survey()

    def reused(self, age: float) -> None:
        """A chunk was used again ``age`` seconds after its last use."""
        self._count(self._reused, age)

    def given_up(self, age: float) -> None:
        """A chunk was not used for ``age`` seconds, and is not watched any more."""
        self._count(self._never, age)

    def chance(self, age: float) -> float:
        """The chance of a use within ``WINDOW``, of what was used ``age`` seconds ago."""
        return self._chances[bucket_of(age)]

    def _count(self, histogram: list[float], age: float) -> None:
        histogram[bucket_of(age)] += 1
        self._samples += 1
        if self._samples == self._next_survey:
            self._chances = self._survey()
            self._next_survey += min(self._samples, REFRESH)
        if self._samples >= FORGET:
            self._samples, self._next_survey = 0, REFRESH
            self._reused = [count / 2 for count in self._reused]
            self._never = [count / 2 for count in self._never]

    def _survey(self) -> list[float]:
        """The chance at each age: later uses within the window, over all that live so long."""
        later = [0.0] * (BUCKETS + 1)
        alive = [0.0] * (BUCKETS + 1)
        for bucket in range(BUCKETS - 1, -1, -1):
            later[bucket] = later[bucket + 1] + self._reused[bucket]
            alive[bucket] = alive[bucket + 1] + self._reused[bucket] + self._never[bucket]
        chances: list[float] = []
        least = 1.0
        for bucket, beyond in enumerate(_WITHIN_WINDOW):
            uses = later[bucket] - later[min(beyond, BUCKETS)]
            # Few get old, so what is known of old ages is noise: the chance only falls with age.
            least = min(least, uses / alive[bucket])
            chances.append(least)
        return chances
