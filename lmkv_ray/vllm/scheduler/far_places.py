"""What the arenas of an engine's other nodes have: asked once a request, without waiting.

One message a place and group, answered by its shard when it has brought what was missing, or
cannot. Nothing is held by an answer: it says where the chunks are and their generations, so that
a copy of a chunk that was lost meanwhile is noticed as it is everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lmkv_ray.config import Settings
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.scheduler.places import Place
from lmkv_ray.vllm.scheduler.requests import Asked, FoundChunks, TrackedRequest

FRESH_SECONDS = 2.0
"""An answer that was used before is asked for again after so long; a request may have to wait for
free blocks between one use and the next."""


class FarPlaces:
    """Asks them.

    Args:
        settings: of this engine.
        groups: the engine's KV groups, in its order.
        places: all but the first one; there may be none.
        remaining: what it takes to compute if so many chunks of a group come, from one on.
    """

    def __init__(
        self,
        settings: Settings,
        groups: Sequence[Group],
        places: Sequence[Place],
        remaining: Callable[[TrackedRequest, Group, int, int], list[float]],
    ) -> None:
        self._settings = settings
        self._groups = groups
        self._places = places
        self._remaining = remaining

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._places)

    @property
    def usable(self) -> bool:
        """Whether all of them have an arena, so that there can be hits."""
        return all(place.link.attachment is not None for place in self._places)

    def ask(self, tracked: TrackedRequest, computed: int, limit: int) -> Asked:
        """Ask for all chunks of a request from token ``computed`` up to ``limit``."""
        within = self._settings.stage_seconds
        asked = tracked.asked = Asked(computed, limit)
        for place in self._places:
            for number, link in place.links.items():
                group = self._groups[number]
                first = computed // group.tokens
                keys = tracked.keys(group, place.number)[first : -(-limit // group.tokens)]
                remaining = self._remaining(tracked, group, first, len(keys))
                space = tracked.space(place.number)
                ticket = link.stage(keys.tobytes(), within, remaining, space=space, locate=True)
                asked.tickets[place.number, number] = ticket
        return asked

    def look(self, tracked: TrackedRequest, computed: int, limit: int) -> list[FoundChunks] | None:
        """What they have of a request, one element a place and group, from token ``computed`` on.

        Returns:
            None: their answers are under way.
        """
        if not self._places:
            return []
        now, asked = time.monotonic(), tracked.asked
        if (
            asked is None
            or not asked.covers(computed, limit)
            or (asked.used is not None and now > asked.used + FRESH_SECONDS)
        ):
            asked = self.ask(tracked, computed, limit)
        if asked.pending:
            return None
        if asked.used is None:
            asked.used = now
        return [
            asked.found(place.number, group, computed // group.tokens, -(-limit // group.tokens))
            for place in self._places
            for group in self._groups
            if group.number in place.links
        ]
