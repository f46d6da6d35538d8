"""Three queues: a small one on probation, a main one, and a memory of what was evicted."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import chain

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies.base import Policy
from lmkv_ray.policies.capacity import ClassCapacity

SMALL = 0.1
"""Share of the capacity that is on probation."""
PROMOTE = 2
"""Hits on probation after which a chunk moves to the main queue."""
MOST = 3
"""Hits that count in the main queue (two bits)."""


class S3FIFO(Policy):
    """Evicts quickly what is used once; keeps what is used again by giving it another turn.

    J. Yang et al.: FIFO queues are all you need for cache eviction, SOSP 2023, as in its authors'
    libCacheSim: until the first eviction, what exceeds the small queue's share goes to the main
    one. With a fixed capacity, and one victim asked for after each chunk that was one too
    many, it hits exactly what that does (``tests/policies/test_oracle.py``).

    Queues move only when a chunk is removed; ``order`` walks over what would move.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._small: OrderedDict[bytes, int] = OrderedDict()
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._capacity = ClassCapacity(capacity)
        self._evicted = False
        # The paper evicts before the new chunk is in a queue: it waits here until the next change.
        self._newest: bytes | None = None
        self._newest_to: OrderedDict[bytes, int] = self._small

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        self._settle()
        if key in self._small or key in self._main:
            self.touched((key,))
            return
        self._capacity.added(len(self) + 1)
        filling = not self._evicted and len(self) < self._capacity.value
        if key in self._ghosts:
            del self._ghosts[key]
            self._newest_to = self._main
        else:
            past = filling and len(self._small) >= self._small_share()
            self._newest_to = self._main if past else self._small
        self._newest = key

    def touched(self, keys: Iterable[bytes]) -> None:
        self._settle()
        for key in keys:
            if key in self._small:
                self._small[key] += 1
            elif key in self._main:
                self._main[key] += 1

    def removed(self, key: bytes) -> None:
        if key == self._newest:
            self._settle()
        if key in self._small:
            self._promote(until=key)
            del self._small[key]
            self._remember(key)
        elif key in self._main:
            if not self._main_is_next(len(self._small), len(self._main)):
                self._promote(until=key)
            self._turn(until=key)
            del self._main[key]
        else:
            return
        self._evicted = True
        self._settle()

    def order(self) -> Iterator[bytes]:
        small: Iterator[tuple[bytes, int]] = iter(self._small.items())
        main = iter(self._main.items())
        left_small, left_main = len(self._small), len(self._main)
        turned: deque[tuple[bytes, int]] = deque()  # what joined the end of the main queue
        newest = self._newest
        probing = False  # the small queue is searched until it yields one, or is empty
        while left_small or left_main:
            if not (probing and left_small) and self._main_is_next(left_small, left_main):
                key, hits = next(main, None) or turned.popleft()
                if hits:
                    turned.append((key, min(hits, MOST) - 1))
                    continue
                left_main -= 1
            else:
                key, hits = next(small)
                left_small -= 1
                if probing := hits >= PROMOTE:
                    turned.append((key, 0))
                    left_main += 1
                    continue
            yield key
            if newest and self._newest_to is self._main:
                turned.append((newest, 0))
                left_main += 1
            elif newest:
                small = chain(small, ((newest, 0),))
                left_small += 1
            newest = None
        if newest:
            yield newest

    def __len__(self) -> int:
        return len(self._small) + len(self._main) + (self._newest is not None)

    def _small_share(self) -> int:
        return max(int(self._capacity.value * SMALL), 1)

    def _main_is_next(self, small: int, main: int) -> bool:
        """Whether to evict from the main queue, given how many are in each."""
        return not small or main > self._capacity.value - self._small_share()

    def _settle(self) -> None:
        if self._newest is not None:
            self._newest_to[self._newest] = 0
            self._newest = None

    def _remember(self, key: bytes) -> None:
        self._ghosts[key] = None
        while len(self._ghosts) > int(self._capacity.value * (1 - SMALL)):
            self._ghosts.popitem(last=False)

    def _promote(self, until: bytes) -> None:
        """Move to the main queue what the way to a victim passed in the small one."""
        while self._small:
            key = next(iter(self._small))
            if key == until or self._small[key] < PROMOTE:
                return
            del self._small[key]
            self._main[key] = 0

    def _turn(self, until: bytes) -> None:
        """Give another turn to what the way to a victim passed in the main queue."""
        while (key := next(iter(self._main))) != until and (hits := self._main[key]):
            self._main[key] = min(hits, MOST) - 1
            self._main.move_to_end(key)
