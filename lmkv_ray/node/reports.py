"""What a node reports to the directory, and what the directory answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from lmkv_ray.messages import Clear
from lmkv_ray.node.directory import DirectoryClient
from lmkv_ray.node.loops import Alarm, whenever
from lmkv_ray.node.shard import Shard

TELL_SECONDS = 0.1
"""Between two reports, at least: what changes meanwhile is reported together."""
HEARTBEAT_SECONDS = 1.0
"""How often the directory hears of a shard that has nothing to tell."""
GUEST_SHARE = 8
"""Even a full shard offers an eighth of its capacity to chunks of nodes that leave: it evicts
others for them."""


class Reports:
    """Keeps every part of the directory informed.

    Args:
        shard: the chunks that are reported.
        directory: receives the reports.
        catch_up: carries out clears that this node has missed.
    """

    def __init__(
        self,
        shard: Shard,
        directory: DirectoryClient,
        catch_up: Callable[[list[Clear]], Awaitable[object]],
    ) -> None:
        self.draining = False
        """Whether the node is about to leave."""
        self.caught_up = False
        """Whether the directory has said which clears we had missed when we started."""
        self._shard = shard
        self._directory = directory
        self._catch_up = catch_up
        self._told: dict[int, tuple[float, int, bool]] = {}
        self._alarms = [Alarm() for _ in range(shard.state.deltas.parts)]

    def changed(self) -> None:
        """There may be something to report."""
        for alarm in self._alarms:
            alarm.ring()

    def start(self) -> list[asyncio.Task[None]]:
        """One loop for each part."""
        return [
            asyncio.create_task(
                whenever(
                    alarm,
                    "telling the directory",
                    partial(self._tell, part),
                    self._shard.clock,
                    (TELL_SECONDS, HEARTBEAT_SECONDS),
                )
            )
            for part, alarm in enumerate(self._alarms)
        ]

    async def _tell(self, part: int) -> None:
        state = self._shard.state
        now, facts = self._shard.clock.monotonic(), (self._shard.cleared, self.draining)
        at, *told = self._told.get(part, (0.0, -1, False))
        beat = now >= at + HEARTBEAT_SECONDS - TELL_SECONDS or tuple(told) != facts
        if not beat and not state.deltas.pending(part):
            return
        self._told[part] = (now, *facts)
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
