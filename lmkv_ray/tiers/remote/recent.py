"""What the store was lately found to hold, bounded."""

from __future__ import annotations

import time
from collections import OrderedDict

MAX_KEYS = 1 << 16
HELD_SECONDS = 600.0
"""An object may be removed by others; a fetch that finds it gone says so."""
MISSING_SECONDS = 10.0
"""Another node may store it any time."""


class Recent:
    """Key -> whether it was there, for a while."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()

    def get(self, key: bytes) -> bool | None:
        """None: not known (any more)."""
        known = self._known.get(key)
        if known is None or time.monotonic() >= known[1]:
            return None
        return known[0]

    def put(self, key: bytes, held: bool) -> None:
        """It is, or is not, there now."""
        until = time.monotonic() + (HELD_SECONDS if held else MISSING_SECONDS)
        self._known[key] = held, until
        self._known.move_to_end(key)
        if len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)

    def forget(self, key: bytes) -> None:
        """It may have changed."""
        self._known.pop(key, None)

    def clear(self) -> None:
        """Everything may have changed."""
        self._known.clear()
