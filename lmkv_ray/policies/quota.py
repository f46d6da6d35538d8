"""A tenant that holds more than its share gives first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies.base import Policy


class Quota(Policy):
    """Victims are first what tenants hold beyond their share, then what the inner policy says.

    So a tenant may use memory that no other tenant wants, and a tenant over the share pays
    for what others need: with shares that add up to one or less, a flood of one tenant leaves
    the others what they hold up to their share, but for one batch of victims. Of a tenant that is
    over, the least recently used chunks go first.

    Args:
        inner: orders all chunks, of all tenants.
        share: of all chunks there are, what one tenant may hold without giving first; above 0.
    """

    def __init__(self, inner: Policy, share: float) -> None:
        self._inner = inner
        self._share = share
        self._space_of: dict[bytes, int] = {}
        self._recent: dict[int, OrderedDict[bytes, None]] = {}
        """Chunks of each tenant, least recently used first."""

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        if self._space_of.get(key, hints.space) != hints.space:
            self._forget(key)
        self._space_of[key] = hints.space
        recent = self._recent.setdefault(hints.space, OrderedDict())
        recent[key] = None
        recent.move_to_end(key)
        self._inner.added(key, hints)

    def touched(self, keys: Iterable[bytes]) -> None:
        keys = tuple(keys)
        for key in keys:
            space = self._space_of.get(key)
            if space is not None:
                self._recent[space].move_to_end(key)
        self._inner.touched(keys)

    def removed(self, key: bytes) -> None:
        self._forget(key)
        self._inner.removed(key)

    def order(self) -> Iterator[bytes]:
        allowed = self._share * len(self)
        # One tenant alone is over every share, but there is no other tenant to make room for.
        over = [recent for recent in self._recent.values() if len(recent) > allowed]
        if not over or len(self._recent) == 1:
            return self._inner.order()
        over.sort(key=len, reverse=True)
        return self._excess_first(over, allowed)

    def __len__(self) -> int:
        return len(self._inner)

    def _excess_first(
        self, over: list[OrderedDict[bytes, None]], allowed: float
    ) -> Iterator[bytes]:
        given: set[bytes] = set()
        for recent in over:
            excess = len(recent) - int(allowed)
            for key, _ in zip(recent, range(excess), strict=False):
                given.add(key)
                yield key
        for key in self._inner.order():
            if key not in given:
                yield key

    def _forget(self, key: bytes) -> None:
        space = self._space_of.pop(key, None)
        if space is not None:
            recent = self._recent[space]
            del recent[key]
            if not recent:
                del self._recent[space]
