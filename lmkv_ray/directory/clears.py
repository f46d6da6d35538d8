"""Which clears there were, so that no node is read from that has missed one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lmkv_ray.messages import Clear, Message

KEPT = 64
"""Clears that are remembered one by one. A shard that missed more is told to clear everything."""

MOST = 1 << 62
"""No clock says a higher number before the year 2116; what says one is wrong."""


class KeptClears(Message, frozen=True):
    """A log of clears as it is kept beyond the life of the directory."""

    since: int
    clears: list[Clear]


class ClearLog:
    """The newest clears, by number.

    The log is kept in the cluster's memory, because the nodes that have carried out a clear may all
    lose their arenas while another node was silent. If that memory is lost, shards still remember
    the number of the last clear that they carried out and tell it with every delta: a new directory
    learns the highest number from them, and a shard that is behind in a way the directory knows
    nothing about is told to clear everything.

    Args:
        step: by how much a number is higher, 1 or more, where the clock does not say. By chance, if
            clears go into a store that other caches use as well: of two clears with one number the
            second would count as carried out.
    """

    def __init__(self, step: Callable[[], int] = lambda: 1) -> None:
        self._step = step
        self.highest = 0
        self._clears: deque[Clear] = deque(maxlen=KEPT)
        self._since = 0  # all clears after this one are in the log

    def kept(self) -> KeptClears:
        """All that a successor must know."""
        return KeptClears(since=self._since, clears=[*self._clears])

    def restore(self, kept: KeptClears) -> None:
        """Begin with what the predecessor knew."""
        self._since = kept.since
        self._clears = deque(kept.clears, maxlen=KEPT)
        self.highest = max([kept.since, *(clear.number for clear in kept.clears)])

    def knows(self, number: int, *, old: bool = False) -> bool:
        """Whether every shard is told of this clear, or was.

        Args:
            number: the number of the clear.
            old: it may have come before all that the log has: then it counts as one of those that
                are not remembered one by one.
        """
        forgotten = old and number < self._since
        return (
            forgotten
            or number == self._since
            or any(clear.number == number for clear in self._clears)
        )

    def new(self, space: bytes, now_ns: int) -> Clear:
        """A clear that has to be carried out from now on.

        Args:
            space: 8 bytes, or none for all.
            now_ns: wall-clock time, or the number that others gave to this clear; it makes numbers
                higher than those of a forgotten log. If the clock was turned back, ``heard`` does.
        """
        clear = Clear(number=max(self.highest + self._step(), now_ns), space=space)
        if len(self._clears) == KEPT:
            self._since = self._clears[0].number
        self._clears.append(clear)
        self.highest = clear.number
        return clear

    def heard(self, number: int) -> None:
        """A shard has carried out this clear."""
        if number in (self.highest, self._since) or not self._since < number <= MOST:
            return
        if all(clear.number != number for clear in self._clears):
            # An earlier life of the directory ordered it, or that of another cluster from which the
            # shard's disk comes: other clears before it are not known.
            self._since = number
            again = dict.fromkeys(clear.space for clear in self._clears if clear.number < number)
            later = [clear for clear in self._clears if clear.number > number]
            self._clears = deque(later, maxlen=KEPT)
            self.highest = max(self.highest, number)
            # The shard must not miss what has a lower number: it is ordered again.
            for space in again:
                self.new(space, 0)

    def owed(self, cleared: int) -> list[Clear]:
        """What a shard has yet to do whose last clear was this one, in order.

        Of several clears of a space only the newest: it would be repeated in vain, at the cost of
        what was stored since.
        """
        if cleared >= self.highest:
            return []
        if cleared < self._since:
            return [Clear(number=self.highest)]
        newest = {clear.space: clear for clear in self._clears if clear.number > cleared}
        since = newest[b""].number if b"" in newest else 0
        return [c for c in self._clears if newest.get(c.space) is c and c.number >= since]
