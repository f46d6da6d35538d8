"""Clears of a store that many share, without listing what is in it.

A clear is an object ``clears/<space>-<number>``, of everything ``clears/all-<number>``. A chunk
that was stored in the same second or before counts as gone: both times are the store's own, so no
clock of ours matters. Nodes look for news of the clears of others now and then.

All nodes of a cluster are told of a clear, some of them much later. The first one carries it out,
and leaves its number for the others; a newer clear of the same space takes the place of older ones.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime

from lmkv_ray.tiers.clears import PendingClear, PendingClears
from lmkv_ray.tiers.remote.objects import Objects

PREFIX = "clears/"
REFRESH_SECONDS = 10.0
ALL = "all"


class Clears:
    """What was cleared when, as far as is known, and what is to be."""

    def __init__(self, objects: Objects) -> None:
        self.pending = PendingClears()
        """Hidden, and not known to the store yet."""
        self._objects = objects
        self._times: dict[str, datetime] = {}
        """Of the store's objects, by what follows ``PREFIX``."""
        self._newest: dict[str, datetime] = {}
        """By space."""
        self._read_at: float | None = None
        self._reading = asyncio.Lock()

    async def carry_out(
        self, clears: Sequence[tuple[int | None, PendingClear]], within: float
    ) -> None:
        """Tell the store of some that are pending. Asks it for others' in any case, which shows
        whether it works. Raises what ``Objects`` does.
        """
        deadline = time.monotonic() + within
        await self._list(within)
        for space, clear in clears:
            numbers = {_parse(name)[1] for name in self._times}
            if clear.number == 0 or clear.number not in numbers:
                # A name is used once: whoever deletes older ones must not hit a newer one.
                await self._put(_space(space), clear.number or time.time_ns(), deadline)
            self.pending.done(space, clear)

    async def refresh(self, within: float) -> None:
        """Read what others cleared, if it is time. Raises what ``Objects`` does."""
        deadline = time.monotonic() + within
        async with asyncio.timeout(within), self._reading:
            if self._read_at is None or time.monotonic() >= self._read_at + REFRESH_SECONDS:
                await self._list(deadline - time.monotonic())

    def covers(self, space: int | None, stored: datetime) -> bool:
        """Whether a chunk of this space (None: of any), stored then, was cleared."""
        second = stored.replace(microsecond=0)
        times = (self._newest.get(name) for name in (_space(space), ALL))
        return self.pending.covers(space) or any(when and second <= when for when in times)

    async def _put(self, space: str, number: int, deadline: float) -> None:
        name = f"{space}-{number:016x}"
        await self._objects.put(PREFIX + name, [b"cleared\n"], deadline - time.monotonic())
        when = await self._objects.modified(PREFIX + name, deadline - time.monotonic())
        if when is None:
            raise OSError(f"{PREFIX}{name} is gone as soon as it is stored")
        older = [n for n in self._times if space in (ALL, _parse(n)[0]) and n != name]
        self._remember(self._times | {name: when})
        for old in older:
            await self._objects.delete(PREFIX + old, deadline - time.monotonic())
            del self._times[old]

    async def _list(self, within: float) -> None:
        listed = await self._objects.listed(PREFIX, within)
        self._remember({path.rpartition("/")[2]: when for path, when in listed.items()})
        self._read_at = time.monotonic()

    def _remember(self, times: dict[str, datetime]) -> None:
        self._times = times
        in_order = sorted(times.items(), key=lambda item: item[1])
        self._newest = {_parse(name)[0]: when for name, when in in_order}


def _space(space: int | None) -> str:
    return ALL if space is None else f"{space:016x}"


def _parse(name: str) -> tuple[str, int]:
    space, _, number = name.partition("-")
    try:
        return space, int(number, 16)
    except ValueError:
        return space, 0
