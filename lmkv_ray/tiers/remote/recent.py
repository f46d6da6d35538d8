"""What the store was lately found to hold, bounded."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime

MAX_KEYS = 1 << 16
HELD_SECONDS = 600.0
"""An object may be removed by others; a fetch that finds it gone says so."""
MISSING_SECONDS = 10.0
"""Another node may store it any time."""


@dataclass(frozen=True, slots=True)
class Known:
    """An answer of the store."""

    stored: datetime | None
    """When it was stored; None: it was not there."""


class Recent:
    """Key -> the last answer, for a while."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[Known, float]] = OrderedDict()

    def get(self, key: bytes) -> Known | None:
        """None: not known (any more)."""
        known = self._known.get(key)
        return known[0] if known is not None and time.monotonic() < known[1] else None

    def put(self, key: bytes, stored: datetime | None) -> Known:
        """Since when it is there; None: it is not."""
        known = Known(stored)
        until = time.monotonic() + (MISSING_SECONDS if stored is None else HELD_SECONDS)
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
