"""The best hit rate that any policy could have: Belady's, which knows the future."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies import Policy


class Belady(Policy):
    """Evicts what is used again last, or never.

    L. Belady: A study of replacement algorithms for a virtual-storage computer, 1966. It is optimal
    for single chunks; where only leading runs are hits, it is what people compare with.

    Args:
        uses: for each key, the numbers of the requests that use it, ascending. Used up.
        now: the number of the current request.
    """

    def __init__(self, uses: dict[bytes, list[int]], now: Callable[[], int]) -> None:
        self._uses = uses
        for numbers in uses.values():
            numbers.reverse()
        self._now = now
        self._next: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []  # (-next use, key); stale where _next differs

    @classmethod
    def of(cls, requests: Iterable[Sequence[bytes]], now: Callable[[], int]) -> Belady:
        """For requests that are numbered from 0."""
        uses: dict[bytes, list[int]] = {}
        for number, keys in enumerate(requests):
            for key in keys:
                uses.setdefault(key, []).append(number)
        return cls(uses, now)

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        numbers, now = self._uses[key], self._now()
        while numbers and numbers[-1] <= now:
            numbers.pop()
        use = -numbers[-1] if numbers else -(1 << 62)
        if self._next.get(key) != use:
            self._next[key] = use
            heapq.heappush(self._heap, (use, key))

    def touched(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key in self._next:
                self.added(key)

    def removed(self, key: bytes) -> None:
        self._next.pop(key, None)

    def order(self) -> Iterator[bytes]:
        return iter(sorted(self._next, key=lambda key: (self._next[key], key)))

    def victims(self, n: int) -> list[bytes]:
        given: list[tuple[int, bytes]] = []
        while self._heap and len(given) < n:
            entry = heapq.heappop(self._heap)
            if self._next.get(entry[1]) == entry[0] and (not given or given[-1] != entry):
                given.append(entry)
        for entry in given:
            heapq.heappush(self._heap, entry)
        return [key for _, key in given]

    def __len__(self) -> int:
        return len(self._next)
