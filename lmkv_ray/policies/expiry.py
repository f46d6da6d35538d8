"""Chunks whose time is over go first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies.base import Clock, Policy


class Expiry(Policy):
    """Chunks past their deadline are the first victims, oldest deadline first.

    A chunk that is used after its deadline has none any more: it was wrong, or it was of
    one request among many that share the chunk.

    Deadlines are rounded up to whole seconds, so that a step costs the logarithm of the number of
    different seconds, not of chunks.

    Args:
        inner: orders the others.
        clock: in the same seconds as the deadlines.
    """

    def __init__(self, inner: Policy, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self._second_of: dict[bytes, int] = {}
        self._keys_of: dict[int, dict[bytes, None]] = {}
        self._seconds: list[int] = []  # a heap of the keys of _keys_of

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        if self._second_of:
            self._forget(key)
        if hints.deadline is not None:
            second = self._second_of[key] = -int(-hints.deadline // 1)
            keys = self._keys_of.get(second)
            if keys is None:
                keys = self._keys_of[second] = {}
                heapq.heappush(self._seconds, second)
            keys[key] = None
        self._inner.added(key, hints)

    def touched(self, keys: Iterable[bytes]) -> None:
        keys = tuple(keys)
        if self._second_of:
            now = self._clock()
            for key in keys:
                if self._second_of.get(key, now + 1) <= now:
                    self._forget(key)
        self._inner.touched(keys)

    def removed(self, key: bytes) -> None:
        if self._second_of:
            self._forget(key)
        self._inner.removed(key)

    def order(self) -> Iterator[bytes]:
        self._drop_empty()
        if not self._seconds or self._seconds[0] > (now := self._clock()):
            return self._inner.order()
        return self._expired_first(now)

    def __len__(self) -> int:
        return len(self._inner)

    def _expired_first(self, now: float) -> Iterator[bytes]:
        for second in sorted(second for second in self._seconds if second <= now):
            yield from self._keys_of[second]
        for key in self._inner.order():
            if self._second_of.get(key, now + 1) > now:
                yield key

    def _forget(self, key: bytes) -> None:
        second = self._second_of.pop(key, None)
        if second is not None:
            del self._keys_of[second][key]

    def _drop_empty(self) -> None:
        if len(self._seconds) > 2 * len(self._second_of) + 64:  # most were renewed or removed
            self._seconds = sorted(second for second, keys in self._keys_of.items() if keys)
            self._keys_of = {second: self._keys_of[second] for second in self._seconds}
        while self._seconds and not self._keys_of[self._seconds[0]]:
            del self._keys_of[heapq.heappop(self._seconds)]
