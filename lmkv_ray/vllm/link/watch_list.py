"""Keys that a listener was told of, looked at again in turn: an eviction sends no message."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

V = TypeVar("V")


class Watched(Generic[V]):
    """A bounded map of keys in the order they were added.

    Args:
        limit: keys there should be at most; see ``excess``.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[bytes, V] = OrderedDict()
        self._round: deque[bytes] = deque()  # keys whose turn is still to come in this round

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, key: bytes, value: V) -> None:
        """Watch a key."""
        self._values[key] = value

    def pop(self, key: bytes) -> V | None:
        """Watch it no longer."""
        return self._values.pop(key, None)

    def excess(self) -> list[bytes]:
        """The oldest keys above the limit, for the caller to ``pop``."""
        surplus = len(self) - self._limit
        return [key for key, _ in zip(self, range(surplus), strict=False)]

    def turn(self, n: int) -> list[tuple[bytes, V]]:
        """Up to ``n`` keys to look at now; everyone has its turn before anyone has another."""
        if not self._round:
            self._round.extend(self)
        keys = [self._round.popleft() for _ in range(min(n, len(self._round)))]
        return [(key, self._values[key]) for key in keys if key in self._values]
