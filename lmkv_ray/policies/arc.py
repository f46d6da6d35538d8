"""Adaptive replacement."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies.base import Policy
from lmkv_ray.policies.capacity import ClassCapacity


class ARC(Policy):
    """Balances recency and frequency by what it evicted and should not have.

    N. Megiddo, D. Modha: ARC, a self-tuning, low overhead replacement cache, FAST 2003. T1 holds
    what was used once, T2 what was used more often, B1 and B2 remember what was evicted from
    them (together never more keys than the capacity in T1 and B1, twice that in all four). A key
    that comes back from B1 or B2 moves ``p``, the size that T1 should have.

    Two things differ from the paper, because here a chunk is evicted before it is known which one
    comes. Adding a chunk adapts ``p`` and trims the ghosts at once, but evicts nothing; a victim is
    chosen when one is asked for. And the capacity is not given (see ``ClassCapacity``). With a
    fixed capacity, and one victim asked for after each chunk that was one too many, the result is
    the paper's, hit by hit (``tests/policies/test_oracle.py``).
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._t1: OrderedDict[bytes, None] = OrderedDict()
        self._t2: OrderedDict[bytes, None] = OrderedDict()
        self._b1: OrderedDict[bytes, None] = OrderedDict()
        self._b2: OrderedDict[bytes, None] = OrderedDict()
        self._p = 0.0
        self._capacity = ClassCapacity(capacity)
        # The paper chooses the victim before the new chunk is in T1, and prefers T1 at a tie if the
        # new chunk came from B2. So for the first victim after an addition:
        self._uncounted = 0  # in T1
        self._tie_takes_t1 = False

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        if key in self._t1 or key in self._t2:
            self.touched((key,))
            return
        self._capacity.added(len(self) + 1)
        capacity = self._capacity.value
        if key in self._b1:
            self._p = min(self._p + max(len(self._b2) / len(self._b1), 1.0), capacity)
            del self._b1[key]
            self._t2[key] = None
            self._next_victim(uncounted=0, tie_takes_t1=False)
        elif key in self._b2:
            self._p = max(self._p - max(len(self._b1) / len(self._b2), 1.0), 0.0)
            del self._b2[key]
            self._t2[key] = None
            self._next_victim(uncounted=0, tie_takes_t1=True)
        else:
            self._t1[key] = None
            self._next_victim(uncounted=1, tie_takes_t1=False)
        self._trim()

    def touched(self, keys: Iterable[bytes]) -> None:
        t1, t2 = self._t1, self._t2
        for key in keys:
            if key in t2:
                t2.move_to_end(key)
            elif key in t1:
                del t1[key]
                t2[key] = None

    def removed(self, key: bytes) -> None:
        if key in self._t1:
            del self._t1[key]
            self._b1[key] = None
        elif key in self._t2:
            del self._t2[key]
            self._b2[key] = None
        else:
            return
        self._next_victim(uncounted=0, tie_takes_t1=False)
        self._trim()

    def order(self) -> Iterator[bytes]:
        once, often = iter(self._t1), iter(self._t2)
        left_once, left_often = len(self._t1), len(self._t2)
        uncounted, tie_takes_t1 = self._uncounted, self._tie_takes_t1
        while left_once or left_often:
            over = left_once - uncounted - self._p
            if left_once and (over > 0 or (over == 0 and tie_takes_t1) or not left_often):
                yield next(once)
                left_once -= 1
            else:
                yield next(often)
                left_often -= 1
            uncounted, tie_takes_t1 = 0, False

    def __len__(self) -> int:
        return len(self._t1) + len(self._t2)

    def _next_victim(self, *, uncounted: int, tie_takes_t1: bool) -> None:
        self._uncounted, self._tie_takes_t1 = uncounted, tie_takes_t1

    def _trim(self) -> None:
        """Keep the ghosts within their bounds."""
        capacity, b1, b2 = self._capacity.value, self._b1, self._b2
        while b1 and len(self._t1) + len(b1) > capacity:
            b1.popitem(last=False)
        while b2 and len(self._t1) + len(self._t2) + len(b1) + len(b2) > 2 * capacity:
            b2.popitem(last=False)
