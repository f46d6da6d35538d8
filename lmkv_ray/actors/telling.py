"""What a shard tells the directory, and what it is told in return."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from lmkv_ray.actors.core import Shard
from lmkv_ray.actors.loops import forever
from lmkv_ray.actors.parts import Directory
from lmkv_ray.messages import Clear

TELL_SECONDS = 0.1
HEARTBEAT_SECONDS = 1.0
"""How often the directory hears of a shard that has nothing to tell."""
SEAL_SECONDS = 1.0
"""For so long the directory waits for checksums."""
GUEST_SHARE = 8
"""A full shard takes in as much from nodes that leave as this part of itself (an eighth)."""


class Telling:
    """Keeps every part of the directory informed.

    Args:
        shard: about whom.
        directory: whom.
        catch_up: carries out clears that were missed.
        seal: notes checksums of what the directory is going to be told of.
    """

    def __init__(
        self,
        shard: Shard,
        directory: Directory,
        catch_up: Callable[[list[Clear]], Awaitable[object]],
        seal: Callable[[], Awaitable[object]],
    ) -> None:
        self.draining = False
        """Whether the node is about to leave."""
        self.caught_up = False
        """Whether the directory has said which clears we had missed when we started."""
        self._shard = shard
        self._directory = directory
        self._catch_up = catch_up
        self._seal = seal
        self._told: dict[int, tuple[float, int, bool]] = {}

    def start(self) -> list[asyncio.Task[None]]:
        """One loop for each part."""
        parts = range(self._shard.state.deltas.parts)
        return [
            asyncio.create_task(
                forever("telling the directory", TELL_SECONDS, partial(self._tell, part))
            )
            for part in parts
        ]

    async def _tell(self, part: int) -> None:
        state = self._shard.state
        now, facts = time.monotonic(), (self._shard.cleared, self.draining)
        at, *told = self._told.get(part, (0.0, -1, False))
        beat = now >= at + HEARTBEAT_SECONDS or tuple(told) != facts
        if not beat and not state.deltas.pending(part):
            return
        self._told[part] = (now, *facts)
        with contextlib.suppress(TimeoutError):  # who needs a checksum that was not noted asks
            await asyncio.wait_for(self._seal(), SEAL_SECONDS)
        while True:
            delta = msgspec.structs.replace(
                state.delta(part),
                cleared=facts[0],
                draining=facts[1],
                room=self._room(),
                engines=len(state.engines()),
                kin=[] if part else state.kin(),
            )
            reply = await self._directory.tell(part, delta)
            if reply is None:
                return
            await self._catch_up(reply.clears)
            if part == 0:  # which orders clears, and hears of engines
                self.caught_up = True
                state.kin_elsewhere = reply.kin
            if reply.resync:
                state.deltas.resync(part)
            # The pieces of a snapshot follow each other; anything else can wait.
            if not state.deltas.midway(part):
                return

    def _room(self) -> int:
        free = self._shard.capacity - self._shard.state.chunks.nbytes
        return max(free, 0) + self._shard.capacity // GUEST_SHARE
