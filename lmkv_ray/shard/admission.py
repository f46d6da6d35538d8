"""Selects the chunks that are also written to tiers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Literal

Rule = Literal["second_hit", "all"]

MAX_WAITING = 1 << 16
"""Chunks that wait to be written; the one that waits longest makes room."""
MAX_SEEN = 1 << 18
"""Chunks that are remembered after they were saved once (about 30 MiB)."""


class Admission:
    """Collects chunks that are to be written to lower tiers, oldest first; bounded.

    Args:
        rule: ``all``: whatever is saved. ``second_hit``: what is used a second time, which spares
            the medium all that is asked once only. A second use is a hit in memory, or that
            it is saved again, after it was evicted: a tier below memory is there for what memory
            cannot hold until then (docs/policies.md has figures).
        limit: chunks that may wait.
    """

    def __init__(self, rule: Rule | None, limit: int = MAX_WAITING) -> None:
        self.missed = 0
        """Chunks that were admitted and not written: evicted before, or too many waited."""
        self._rule = rule
        self._limit = limit
        self._waiting: OrderedDict[bytes, None] = OrderedDict()
        self._admitted: set[bytes] = set()  # in this life of the chunk
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        """Chunks that wait."""
        return len(self._waiting)

    def committed(self, keys: Iterable[bytes]) -> None:
        """Chunks are ready."""
        if self._rule == "all":
            self._admit(keys)
        elif self._rule is not None:
            self._admit([key for key in keys if self._seen_before(key)])

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

    def validate(self, ready: Collection[bytes]) -> None:
        """Check bounds, and that only ready chunks wait, for tests and simulations.

        Args:
            ready: keys of all chunks in memory.

        Raises:
            AssertionError: something does not hold; the text says what.
        """
        assert len(self._waiting) <= self._limit, f"{len(self._waiting)} chunks wait"
        assert len(self._seen) <= MAX_SEEN, f"{len(self._seen)} keys are remembered"
        assert self._waiting.keys() <= self._admitted, "a chunk waits that was not admitted"
        assert all(key in ready for key in self._admitted), "a chunk is admitted and not ready"

    def _seen_before(self, key: bytes) -> bool:
        seen = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return seen

    def _admit(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key not in self._admitted:
                self._admitted.add(key)
                self._waiting[key] = None
                if len(self._waiting) > self._limit:
                    self._waiting.popitem(last=False)
                    self.missed += 1
