"""SharedClears of a store that many share, in the store's own order: no clock is compared.

A clear is an object ``clears/<space>-<turn>-<id>-<number>``, of everything ``clears/all-...``.
It takes the turn after the last clear of its space that the store lists. If several take the same
turn at the same time, the highest id is the latest one, and the others take another turn. So there
is one latest clear of everything, and one of each space, and no order of events brings an earlier
one back. The ids of those that cover a space are its *mark*.

A chunk is stored with the mark that its writer had read before it looked at the chunk, and it is
believed only while its space has this mark. What was stored before a clear has another one, and so
has what a node stored that had not heard of the clear: it is not served, and makes room for the
next chunk of that name. Nodes look for news of the clears of others now and then. What a node holds
in memory may be older than such news: it stores nothing of the space before it was told to clear
its memory as well (``Tier.unheard``).

A listing may lack what an earlier one had (a cache in between, a replica that is behind, objects
that were removed by hand). A clear that was seen once counts until a later one is seen that
includes it: only then its object is removed on purpose. Else marks would go back, and what was
cleared would be served again.

All nodes of a cluster are told of a clear, some of them much later. The first one carries it out,
and leaves its number for the others; a newer clear of the same space takes the place of older ones.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import xor

from lmkv_ray.clock import Clock
from lmkv_ray.tenants import covering, covers
from lmkv_ray.tiers.clears import MAX_SPACES, PendingClear, PendingClears, Unheard
from lmkv_ray.tiers.remote.objects import MOST_LISTED, Objects

PREFIX = "clears/"
REFRESH_SECONDS = 10.0
TOLD = 1024
"""Numbers of clears that are remembered as those of this node."""
TURNS = 16
"""Times that one clear tries to be the latest one; more at once is no accident."""

_NAME = re.compile(r"(all|[0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})")


@dataclass(frozen=True, slots=True, order=True)
class StoredClear:
    """One clear, as its name says. Of clears of one space the greatest is the latest."""

    turn: int
    id: int
    space: int | None
    """None: everything."""
    number: int
    """See ``Tier.clear``."""

    @property
    def name(self) -> str:
        """Of its object."""
        space = "all" if self.space is None else f"{self.space:016x}"
        return f"{PREFIX}{space}-{self.turn:016x}-{self.id:016x}-{self.number:016x}"

    @classmethod
    def parse(cls, name: str) -> StoredClear | None:
        """From a name; None if it is none of ours."""
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            return None
        space, *numbers = match.groups()
        turn, identity, number = (int(text, 16) for text in numbers)
        return cls(turn, identity, None if space == "all" else int(space, 16), number)


class SharedClears:
    """What was cleared, as far as is known, and what is to be.

    Args:
        objects: the store.
        clock: of the machine: for deadlines, and for ids that are random.
    """

    def __init__(self, objects: Objects, clock: Clock) -> None:
        self.pending = PendingClears()
        """Hidden, and not known to the store yet."""
        self._objects = objects
        self._clock = clock
        self._known: dict[StoredClear, int] = {}
        """With the number of the listing in which each was seen first."""
        self._listings = 0
        self._latest: dict[int | None, StoredClear] = {}
        """By space."""
        self._unheard: dict[int | None, Unheard] = {}
        """By space: of others, and this node has not been told of it."""
        self._own: deque[int] = deque(maxlen=TOLD)
        """Ids of the newest clears of this node."""
        self._told: deque[int] = deque(maxlen=TOLD)
        self._read_at: float | None = None
        self._reading = asyncio.Lock()

    def told(self, space: int | None, number: int) -> None:
        """A clear is to be carried out; memory holds nothing any more of what it covers."""
        self.pending.add(space, number)
        self._told += [number] if number else []
        self._unheard = {
            which: unheard
            for which, unheard in self._unheard.items()
            if not _includes(space, which) and unheard.number != number
        }

    @property
    def unheard(self) -> list[Unheard]:
        """See ``Tier``."""
        return list(self._unheard.values())

    def heard(self, clear: Unheard) -> None:
        """See ``Tier``."""
        if self._unheard.get(clear.space) == clear:
            del self._unheard[clear.space]

    async def carry_out(
        self, clears: Sequence[tuple[int | None, PendingClear]], within: float
    ) -> None:
        """Tell the store of some that are pending. Asks it for others' in any case, which shows
        whether it works. Raises what ``Objects`` does.
        """
        deadline = self._clock.monotonic() + within
        await self._list(within)
        for space, clear in clears:
            numbers = {stored.number for stored in self._latest.values()}
            if clear.number == 0 or clear.number not in numbers:
                await self._put(space, clear.number, deadline)
            self.pending.done(space, clear)

    async def refresh(self, within: float) -> None:
        """Read what others cleared, if it is time. Raises what ``Objects`` does."""
        deadline = self._clock.monotonic() + within
        async with asyncio.timeout(within), self._reading:
            if self._read_at is None or self._clock.monotonic() >= self._read_at + REFRESH_SECONDS:
                await self._list(deadline - self._clock.monotonic())

    def mark(self, space: int) -> int:
        """Of a space, as far as is known, 8 bytes; 0: nothing of it was ever cleared."""
        latest = (self._latest.get(which) for which in covering(space))
        return reduce(xor, (clear.id for clear in latest if clear is not None), 0)

    def allows(self, space: int) -> bool:
        """Whether chunks of this space may be stored."""
        unheard = any(which in self._unheard for which in covering(space))
        return not unheard and not self.pending.covers(space)

    def covers(self, space: int, mark: int) -> bool:
        """Whether a chunk of this space, stored with this mark, was cleared."""
        return self.pending.covers(space) or mark != self.mark(space)

    async def _put(self, space: int | None, number: int, deadline: float) -> None:
        if len(self._latest) > MAX_SPACES:
            space = None
        for _ in range(TURNS):
            before = [*self._known]
            turn = max((c.turn for c in before if c.space == space), default=0) + 1
            clear = StoredClear(turn, self._new_id(), space, number)
            self._own.append(clear.id)
            await self._objects.put(clear.name, [b"cleared\n"], deadline - self._clock.monotonic())
            await self._list(deadline - self._clock.monotonic())
            if self._latest.get(space) == clear:
                break
            if clear not in self._known:
                raise OSError(f"{PREFIX} does not list what was just stored there")
        else:
            raise OSError(f"{PREFIX} does not list what was just stored there as the latest")
        # Those that were listed before are earlier; of what came meanwhile nothing is known.
        for old in before:
            if _includes(space, old.space):
                await self._objects.delete(old.name, deadline - self._clock.monotonic())
                self._remember(frozenset(self._known) - {old})

    def _new_id(self) -> int:
        return int.from_bytes(self._clock.random_bytes(8), "little") | 1

    async def _list(self, within: float) -> None:
        names = await self._objects.listed(PREFIX, within)
        listed = frozenset(c for name in names if (c := StoredClear.parse(name)))
        self._listings += 1
        for news in listed - self._known.keys():
            if news.id not in self._own and news.number not in self._told:
                first = self._read_at is None
                self._unheard[news.space] = Unheard(news.space, news.number, first)
        self._remember(listed)
        self._read_at = self._clock.monotonic()

    def _remember(self, listed: frozenset[StoredClear]) -> None:
        seen = {clear: self._known.get(clear, self._listings) for clear in listed}
        lacking = [
            clear
            for clear, at in self._known.items()
            if clear not in listed
            and self._latest.get(clear.space) == clear
            and not any(_replaces(other, seen[other], clear, at) for other in listed)
        ]
        # At most as many as one listing has.
        kept = lacking[-MOST_LISTED:]
        self._known = {clear: self._known[clear] for clear in kept} | seen
        self._latest = {clear.space: clear for clear in sorted(self._known, key=_by_turn)}


def _replaces(one: StoredClear, one_seen: int, other: StoredClear, other_seen: int) -> bool:
    """Whether the first clear came after the other and includes it.

    Args:
        one: a clear.
        one_seen: the listing in which it was seen first.
        other: another clear.
        other_seen: the same of it. Of clears of different spaces that were seen at once the number,
            which says when they were ordered, has to decide.
    """
    if one.space == other.space:
        return _by_turn(one) > _by_turn(other)
    later = (one_seen, one.number) > (other_seen, other.number)
    return later and _includes(one.space, other.space)


def _includes(one: int | None, other: int | None) -> bool:
    """Whether all that the other clear covers is covered by the one."""
    return one is None or (other is not None and covers(one, other))


def _by_turn(clear: StoredClear) -> tuple[int, int]:
    return clear.turn, clear.id
