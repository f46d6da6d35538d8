"""Which chunks have earned a place below memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

Rule = Literal["second_hit", "all"]

MAX_WAITING = 1 << 16
"""Chunks that wait to be written; the one that waits longest makes room."""


class Admission:
    """Collects chunks that are to be written to lower tiers, oldest first; bounded.

    Args:
        rule: ``all``: whatever is saved. ``second_hit``: what was used again after it was saved,
            which spares the medium all that is asked once only.
        limit: chunks that may wait.
    """

    def __init__(self, rule: Rule | None, limit: int = MAX_WAITING) -> None:
        self.missed = 0
        """Chunks that earned a place and were gone, or too many, before they were written."""
        self._rule = rule
        self._limit = limit
        self._waiting: OrderedDict[bytes, None] = OrderedDict()
        self._admitted: set[bytes] = set()  # in this life of the chunk

    def __len__(self) -> int:
        """Chunks that wait."""
        return len(self._waiting)

    def committed(self, keys: Iterable[bytes]) -> None:
        """Chunks are ready."""
        if self._rule == "all":
            self._admit(keys)

    def touched(self, keys: Iterable[bytes]) -> None:
        """Ready chunks were hit."""
        if self._rule is not None:
            self._admit(keys)

    def removed(self, keys: Iterable[bytes]) -> None:
        """Chunks are not in memory any more."""
        for key in keys:
            self._admitted.discard(key)
            if self._waiting.pop(key, key) is None:
                self.missed += 1

    def take(self) -> bytes | None:
        """The next chunk to write; None if none waits."""
        return self._waiting.popitem(last=False)[0] if self._waiting else None

    def _admit(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key not in self._admitted:
                self._admitted.add(key)
                self._waiting[key] = None
                if len(self._waiting) > self._limit:
                    self._waiting.popitem(last=False)
                    self.missed += 1
