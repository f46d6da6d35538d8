"""Load, recompute, or load a part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Choice:
    """What is expected to be the quickest."""

    chunks: int
    """Leading chunks to load; the rest is computed."""
    load_seconds: float
    """Expected until they are loaded."""
    total_seconds: float
    """Expected until everything is loaded or computed."""
    compute_seconds: float
    """Expected if nothing is loaded."""


def choose(arrival: npt.ArrayLike, remaining: npt.ArrayLike) -> Choice:
    """The number of leading chunks to load before computing the rest.

    Args:
        arrival: float[n]: expected seconds until chunk i is here; it is usable when all before it
            are here too.
        remaining: float[n + 1]: expected seconds of computing once the first k chunks are here.
    """
    ready = np.concatenate([[0.0], np.maximum.accumulate(np.asarray(arrival, np.float64))])
    left = np.asarray(remaining, np.float64)
    total = ready + left
    best = int(total.argmin())
    return Choice(best, float(ready[best]), float(total[best]), float(left[0]))
