"""What an eviction policy must do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Policy(Protocol):
    """Orders the ready chunks of one size class by how soon they may be evicted.

    Contracts:
        - A policy knows exactly the keys that were ``added`` and not yet ``removed``.
        - ``added`` of a known key counts as a touch; ``touched`` and ``removed`` of an unknown key
          do nothing (messages arrive late).
        - ``victims`` changes nothing: the caller says ``removed`` for what it did evict. It returns
          distinct known keys, ``min(n, len(policy))`` of them, best victim first; asking for none
          is always safe.
        - All methods are deterministic, and amortised O(1) per key.
    """

    def added(self, key: bytes) -> None:
        """A chunk became ready."""

    def touched(self, keys: Iterable[bytes]) -> None:
        """Chunks were hit, the one to keep longest last (a prompt's deepest chunk first)."""

    def removed(self, key: bytes) -> None:
        """A chunk is gone, for whatever reason."""

    def victims(self, n: int) -> list[bytes]:
        """The ``n`` chunks to evict first (fewer if there are fewer)."""

    def __len__(self) -> int:
        """How many chunks it knows."""
