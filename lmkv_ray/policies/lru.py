"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice


class LRU:
    """Evicts what was not used for longest.

    A prompt's chunks are touched deepest first, so its tail ages before its head: a tail without
    its head can never be used, a head without its tail can.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def touched(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key in self._order:
                self._order.move_to_end(key)

    def removed(self, key: bytes) -> None:
        self._order.pop(key, None)

    def victims(self, n: int) -> list[bytes]:
        return list(islice(self._order, max(n, 0)))

    def __len__(self) -> int:
        return len(self._order)
