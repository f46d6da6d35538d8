"""Pinned chunks are never victims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies.base import Policy


class Pins(Policy):
    """Passes over pinned chunks. The outermost wrapper: no other brings them back.

    The allocator calls ``pin`` and bounds the pins; the ``pinned`` hint alone does nothing. A pin
    does not hold the chunks before it: pin whole prefixes. Choosing victims costs one step for
    every pinned chunk that is passed over.
    """

    def __init__(self, inner: Policy) -> None:
        self._inner = inner
        self.pinned: set[bytes] = set()
        self.of_requests: set[bytes] = set()
        """Those of ``pinned`` that only requests asked for."""

    def pin(self, key: bytes, pinned: bool) -> None:
        """Pin a chunk, which is known, or let it go."""
        self.of_requests.discard(key)
        if pinned:
            self.pinned.add(key)
        else:
            self.pinned.discard(key)

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        self._inner.added(key, hints)

    def touched(self, keys: Iterable[bytes]) -> None:
        self._inner.touched(keys)

    def removed(self, key: bytes) -> None:
        self.pinned.discard(key)
        self.of_requests.discard(key)
        self._inner.removed(key)

    def order(self) -> Iterator[bytes]:
        return (key for key in self._inner.order() if key not in self.pinned)

    def victims(self, n: int) -> list[bytes]:
        return super().victims(n) if self.pinned else self._inner.victims(n)

    def __len__(self) -> int:
        return len(self._inner)
