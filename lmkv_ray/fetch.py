"""A wish for chunks and what became of each: how callers speak with transports and with tiers."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.keys import KeyArray


class Failure(enum.StrEnum):
    """Why a chunk did not arrive."""

    MISSING = "missing"
    """The peer does not hold it (any more)."""
    CHANGED = "changed"
    """The peer evicted it while it was copied."""
    CORRUPT = "corrupt"
    """What arrived does not have the chunk's checksum."""
    TOO_LARGE = "too_large"
    """It is larger than the slot."""
    LOST = "lost"
    """The peer died, or answered with an error or with nonsense."""
    LATE = "late"
    """The deadline passed."""


@dataclass(frozen=True)
class Outcome:
    """What became of one key of a fetch."""

    position: int
    """Which key of ``Fetch.keys``."""
    nbytes: int = 0
    checksum: int = 0
    """``arena.checksum`` of the bytes; 0: not known."""
    failure: Failure | None = None
    detail: str = ""
    """For logs: what the peer's failure was."""

    @property
    def ok(self) -> bool:
        """The chunk is complete in its destination."""
        return self.failure is None


@dataclass(frozen=True)
class Fetch:
    """A wish for chunks."""

    keys: KeyArray
    destinations: Sequence[npt.NDArray[np.uint8]]
    """For each key the writable bytes of a slot that is reserved for it."""
    within: float
    """Seconds from the call of ``fetch``."""


def failed(positions: Sequence[int], failure: Failure, detail: str = "") -> list[Outcome]:
    """The same failure for several keys of a fetch."""
    return [Outcome(position, failure=failure, detail=detail) for position in positions]


def groups(sizes: Sequence[int], limit: int, first: int | None = None) -> list[range]:
    """Positions in groups of at most ``limit`` bytes, and at least one member.

    Args:
        sizes: bytes of each.
        limit: the most bytes that a group may have.
        first: limit of the first group; that of each later one is twice that of the one before.
    """
    result, start, total = [], 0, 0
    allowed = limit if first is None else first
    for position, size in enumerate(sizes):
        if position > start and total + size > allowed:
            result.append(range(start, position))
            start, total = position, 0
            allowed = min(2 * allowed, limit)
        total += size
    if start < len(sizes):
        result.append(range(start, len(sizes)))
    return result
