"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies.base import Policy


class LRU(Policy):
    """Evicts what was not used for longest.

    A prompt's chunks are touched deepest first, so its tail ages before its head: a tail without
    its head can never be used, a head without its tail can.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def touched(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key in self._order:
                self._order.move_to_end(key)

    def removed(self, key: bytes) -> None:
        self._order.pop(key, None)

    def order(self) -> Iterator[bytes]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
