"""Clears of a store that many share, without listing what is in it.

A clear of a space is an object ``clears/<space>``, of everything ``clears/all``. A chunk that was
stored in the same second or before counts as gone: both times are the store's own, so no clock of
ours matters. Nodes look for news of the clears of others now and then; a clear that goes through
the directory reaches every node at once, as each makes its own.
"""

from __future__ import annotations

import time
from datetime import datetime

from lmkv_ray.tiers.remote.objects import Objects

PREFIX = "clears/"
REFRESH_SECONDS = 10.0
ALL = "all"


class Clears:
    """What was cleared when, as far as is known."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._times: dict[str, datetime] = {}
        self._read_at: float | None = None

    async def add(self, space: int | None, within: float) -> None:
        """Clear a space, or everything. Raises what ``Objects`` does."""
        name = PREFIX + _name(space)
        await self._objects.put(name, [b"cleared\n"], within)
        when = await self._objects.modified(name, within)
        if when is not None:
            self._times[_name(space)] = when

    async def refresh(self, within: float) -> None:
        """Read what others cleared, if it is time. Raises what ``Objects`` does."""
        if self._read_at is not None and time.monotonic() < self._read_at + REFRESH_SECONDS:
            return
        try:
            listed = await self._objects.listed(PREFIX, within)
        except StopAsyncIteration:
            listed = {}
        self._times |= {path.rpartition("/")[2]: when for path, when in listed.items()}
        self._read_at = time.monotonic()

    def covers(self, space: int, stored: datetime) -> bool:
        """Whether a chunk of this space, stored then, was cleared."""
        second = stored.replace(microsecond=0)
        return any(second <= self._times[n] for n in (_name(space), ALL) if n in self._times)


def _name(space: int | None) -> str:
    return ALL if space is None else f"{space:016x}"
