"""What the store was lately found to hold, bounded."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from lmkv_ray.clock import Clock

MAX_KEYS = 1 << 16
HELD_SECONDS = 600.0
"""An object may be removed by others; a fetch that finds it gone says so."""
MISSING_SECONDS = 10.0
"""Another node may store it any time."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What the header of a chunk in the store says."""

    space: int
    mark: int
    """See ``SharedClears.mark``."""


@dataclass(frozen=True, slots=True)
class Known:
    """An answer of the store."""

    stored: Stored | None
    """None: there is no such chunk."""


class Recent:
    """Key -> the last answer, for a while.

    Args:
        clock: of the machine: an answer holds for a while.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[Known, float]] = OrderedDict()

    def get(self, key: bytes) -> Known | None:
        """None: not known (any more)."""
        known = self._known.get(key)
        return known[0] if known is not None and self._clock.monotonic() < known[1] else None

    def put(self, key: bytes, stored: Stored | None) -> Known:
        """What is there."""
        known = Known(stored)
        until = self._clock.monotonic() + (MISSING_SECONDS if stored is None else HELD_SECONDS)
        self._known[key] = known, until
        self._known.move_to_end(key)
        if len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)
        return known

    def clear(self) -> None:
        """Everything may have changed."""
        self._known.clear()

    def forget(self, key: bytes) -> None:
        """It may have changed."""
        self._known.pop(key, None)
