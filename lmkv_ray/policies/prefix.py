"""A chunk is worth something only with all chunks before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies.base import Policy


class Prefix(Policy):
    """Orphans go first, and no chunk goes before those that need it.

    A chunk whose predecessor was here and is gone can never be hit: it is an *orphan*, and the
    first victim, with all that follows it. When the inner policy names a chunk, those that
    follow it go before it, the deepest first: that is one step per chunk named, and the way
    down (at most a prompt's chunks) when the inner order did not have the tail first.
    """

    def __init__(self, inner: Policy) -> None:
        self._inner = inner
        self._after: dict[bytes, bytes] = {}
        """Predecessor of each known chunk that has one."""
        self._next: dict[bytes, dict[bytes, None]] = {}
        """Known chunks that follow a key, which may be gone itself."""
        self._orphaned: dict[bytes, None] = {}
        """Keys that are gone, with known chunks that follow them."""

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        self._unlink(key)
        self._orphaned.pop(key, None)
        # A prompt's last chunk may be added first: until its predecessor was here, it is no orphan.
        if hints.after and hints.after != key:
            self._after[key] = hints.after
            self._next.setdefault(hints.after, {})[key] = None
        self._inner.added(key, hints)

    def touched(self, keys: Iterable[bytes]) -> None:
        self._inner.touched(keys)

    def removed(self, key: bytes) -> None:
        known = len(self._inner)
        self._inner.removed(key)
        self._unlink(key)  # also of a key that the inner policy did not take
        if len(self._inner) < known and key in self._next:
            self._orphaned[key] = None

    def order(self) -> Iterator[bytes]:
        given: set[bytes] = set()
        for gone in self._orphaned:
            for orphan in self._next[gone]:
                yield from self._tail_first(orphan, given)
        for key in self._inner.order():
            if key not in given:
                if key in self._next:
                    yield from self._tail_first(key, given)
                else:
                    given.add(key)
                    yield key

    def __len__(self) -> int:
        return len(self._inner)

    def _tail_first(self, key: bytes, given: set[bytes]) -> Iterator[bytes]:
        """The chunk and all that follow it and were not given yet, the deepest first."""
        if key in given:
            return
        path = [(key, iter(self._next.get(key, ())))]
        entered = {key}  # wrong hints may close a circle
        while path:
            tip, followers = path[-1]
            for follower in followers:
                if follower not in given and follower not in entered:
                    entered.add(follower)
                    path.append((follower, iter(self._next.get(follower, ()))))
                    break
            else:
                path.pop()
                given.add(tip)
                yield tip

    def _unlink(self, key: bytes) -> None:
        before = self._after.pop(key, None)
        if before is None:
            return
        followers = self._next[before]
        del followers[key]
        if not followers:
            del self._next[before]
            self._orphaned.pop(before, None)
