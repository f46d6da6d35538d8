"""Granted slots, and the news of them: the engine's thread leaves it, the link's fetches it.

Nothing here waits longer than for a lock that is held for microseconds. All is bounded: by the
slots that a shard grants, and by ``MAX_TOUCHED``.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.messages import Commit, Grant

MAX_TOUCHED = 65536
"""Keys waiting to be reported as used; the rest are forgotten (recency is only a hint)."""


class GrantedSlot(NamedTuple):
    """A slot that was taken to be filled: the caller that took it commits or releases it."""

    slot: int
    arena_id: int
    """The arena it is a slot of."""
    deadline: float
    """``time.monotonic()`` on the shard's node, after which no worker may begin to write."""


@dataclass(slots=True)
class News:
    """What an exchange tells."""

    commits: list[Commit] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    touched: deque[bytes] = field(default_factory=lambda: deque(maxlen=MAX_TOUCHED))
    want: int = 0


class Slots:
    """See the module.

    Args:
        want: free slots to keep at hand.
        wake: called when there is something to tell.
        monotonic: tells the time of this machine in seconds.
    """

    def __init__(
        self,
        want: int,
        wake: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._want = want
        self._wake = wake
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._news = News()
        self._arena_id: int | None = None
        self._ahead = 0.0
        self._free: dict[int, float] = {}  # granted slots not in use, with their deadlines
        self._in_use: dict[int, GrantedSlot] = {}
        self._committing: set[bytes] = set()

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    # -- the engine's thread --------------------------------------------------------------------

    def take(self) -> GrantedSlot | None:
        """A granted slot, or None: there is none now."""
        now = self._monotonic() + self._ahead
        with self._lock:
            while self._free and self._arena_id is not None:
                slot = next(iter(self._free))
                deadline = self._free.pop(slot)
                if deadline > now:
                    granted = self._in_use[slot] = GrantedSlot(slot, self._arena_id, deadline)
                    if self._wanted():
                        self._wake()
                    return granted
                self._news.released.append(slot)
            self._wake()
        return None

    def commit(
        self, granted: GrantedSlot, key: bytes, nbytes: int, hints: Hints = NO_HINTS
    ) -> None:
        """Make a filled slot visible under its key, if it is still ours."""
        with self._lock:
            if self._end_use(granted):
                commit = Commit(slot=granted.slot, key=key, nbytes=nbytes, hints=hints)
                self._news.commits.append(commit)
                self._committing.add(key)
                self._wake()

    def committing(self, key: bytes) -> bool:
        """Whether a commit of this key has not been answered yet."""
        return key in self._committing

    @property
    def settled(self) -> bool:
        """Whether every commit has been answered."""
        return not self._committing

    def release(self, granted: GrantedSlot) -> None:
        """Give a slot back unused. No worker may write to it any more."""
        with self._lock:
            if self._end_use(granted):
                self._news.released.append(granted.slot)

    def touch(self, keys: list[bytes]) -> None:
        """Report chunks as used, deepest first."""
        with self._lock:
            self._news.touched.extend(keys)

    def start_over(self) -> None:
        """What was not told yet is not told any more, and free slots go back: they are of a space
        in which nothing is committed from now on.
        """
        with self._lock:
            untold, self._news.commits = self._news.commits, []
            self._committing.difference_update(commit.key for commit in untold)
            self._news.released += [*(commit.slot for commit in untold), *self._free]
            self._free.clear()

    # -- the link's thread ----------------------------------------------------------------------

    def held(self) -> list[int]:
        """Slots that the shard should know as ours."""
        with self._lock:
            return [*self._free, *self._in_use]

    def welcomed(self, arena_id: int, grant: Grant, ahead: float) -> None:
        """The shard took us in: only what it grants is ours.

        Args:
            arena_id: slots of another arena are gone, and so is what there was to say of them.
            grant: new slots, and those of ``held`` that the shard recognises.
            ahead: seconds that the clock of the shard's node is ahead of ours.
        """
        with self._lock:
            if self._arena_id != arena_id:
                self._in_use = {}
                self._news = News(touched=self._news.touched)
                self._committing.clear()
            slots = dict.fromkeys(grant.slots)
            self._in_use = {s: use for s, use in self._in_use.items() if s in slots}
            # What was held when we asked may have been filled or handed back since.
            told = {commit.slot for commit in self._news.commits} | {*self._news.released}
            self._free = {s: grant.deadline for s in slots if s not in self._in_use.keys() | told}
            self._arena_id, self._ahead = arena_id, ahead

    @property
    def expires_in(self) -> float:
        """Seconds until a free slot must be handed back; infinity if there is none."""
        with self._lock:
            deadline = next(iter(self._free.values()), math.inf)
        return deadline - self._ahead - self._monotonic()

    @property
    def has_news(self) -> bool:
        """Whether an exchange is due; recency waits for the heartbeat, it is only a hint."""
        with self._lock:
            self._hand_back_expired()
            return bool(self._news.commits or self._news.released or self._wanted())

    def news(self) -> News:
        """All there is to tell; to be followed by ``told``."""
        with self._lock:
            news, self._news = self._news, News()
            news.want = self._wanted()
        return news

    def told(self, news: News) -> None:
        """The shard has heard it, or never will."""
        with self._lock:
            # A key may have been committed a second time since: that one has not been answered.
            untold = {commit.key for commit in self._news.commits}
            self._committing -= {commit.key for commit in news.commits} - untold

    def granted(self, grant: Grant) -> None:
        """More slots."""
        with self._lock:
            self._free |= dict.fromkeys(grant.slots, grant.deadline)

    def return_free(self) -> None:
        """Give back all that is not in use: the grant was overtaken."""
        with self._lock:
            self._news.released.extend(self._free)
            self._free.clear()

    # -- checking --------------------------------------------------------------------------------

    def validate(self) -> None:
        """Compare slots and news with each other, for tests and simulations.

        Raises:
            AssertionError: something does not hold; the text says what.
        """
        with self._lock:
            commits = self._news.commits
            told = [*(commit.slot for commit in commits), *self._news.released]
            known = [*self._free, *self._in_use, *told]
            twice = {slot for slot in known if known.count(slot) > 1}
            assert not twice, (
                f"slots {twice} are more than one of free, in use, committed and released"
            )
            untold = {commit.key for commit in commits} - self._committing
            assert not untold, f"{len(untold)} commits are not known to be under way"
            for slot, use in self._in_use.items():
                assert (use.slot, use.arena_id) == (slot, self._arena_id), f"slot {slot} is {use}"
            deadlines = [*self._free.values()]
            assert deadlines == sorted(deadlines), "free slots are not in the order of deadlines"

    def _end_use(self, granted: GrantedSlot) -> bool:
        """End a use; False if the slot is not ours any more, or was taken again since."""
        ours = self._in_use.get(granted.slot) is granted
        if ours:
            del self._in_use[granted.slot]
        return ours

    def _hand_back_expired(self) -> None:
        """An engine that was idle for long has slots that it must not fill: it needs others."""
        now = self._monotonic() + self._ahead
        while self._free:
            slot, deadline = next(iter(self._free.items()))  # granted first, so first to expire
            if deadline > now:
                return
            del self._free[slot]
            self._news.released.append(slot)

    def _wanted(self) -> int:
        """Free slots to ask for: none while half of them are there."""
        wanted = self._want - len(self._free)
        return wanted if wanted > self._want // 2 else 0
