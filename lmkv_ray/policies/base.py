"""What an eviction policy must do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol, TypeAlias

from lmkv_ray.hints import NO_HINTS, Hints

Clock: TypeAlias = Callable[[], float]
"""Seconds that never go back: ``time.monotonic``, or the time of a trace that is replayed."""


class Policy(Protocol):
    """Orders the ready chunks of one size class by how soon they may be evicted.

    A policy is a *core* that orders by use (LRU, ARC ...), or wraps another one and changes its
    order for one reason (pins, deadlines, predecessors, quotas).

    Contracts:
        - A policy knows exactly the keys that were ``added`` and not yet ``removed``.
        - ``added`` of a known key counts as a touch, and its hints replace those it had;
          ``touched`` and ``removed`` of an unknown key do nothing (messages arrive late).
        - ``order`` and ``victims`` change nothing: the caller says ``removed`` for what it did
          evict. They give distinct known keys, best victim first, and all of them if asked for
          enough (but pinned ones: never). Asking for none is always safe.
        - What is remembered of chunks that are gone is bounded by what is, or was lately, there.
        - All methods are deterministic (given the clock) and amortised O(1) per key; where a
          policy needs more, it says so.
    """

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        """A chunk became ready."""

    def touched(self, keys: Iterable[bytes]) -> None:
        """Chunks were hit, the one to keep longest last (a prompt's deepest chunk first)."""

    def removed(self, key: bytes) -> None:
        """A chunk is gone, for whatever reason."""

    def order(self) -> Iterator[bytes]:
        """The chunks, best victim first; lazily, and only until the next change."""
        ...

    def victims(self, n: int) -> list[bytes]:
        """The ``n`` chunks to evict first (fewer if there are fewer)."""
        return list(islice(self.order(), max(n, 0)))

    def __len__(self) -> int:
        """How many chunks it knows."""
        ...
