"""The directory as a node sees it: one service, or several that share the keys."""

from __future__ import annotations

import asyncio

import msgspec

from lmkv_ray.clock import Clock
from lmkv_ray.directory import Holding, merge, positions_by_part
from lmkv_ray.keys import key_array
from lmkv_ray.messages import ClearDone, Delta, DeltaReply, decode, encode
from lmkv_ray.neighbours import Neighbour, Neighbours

SILENT_SECONDS = 3.0
"""A directory that owes an answer for longer is not asked, nor waited for."""
ANSWER_SECONDS = 10.0
"""A delta that is not answered for so long is given up."""

_HOLDINGS = msgspec.msgpack.Decoder(list[Holding])
_ROOMS = msgspec.msgpack.Decoder(dict[str, int])


class DirectoryClient:
    """All parts of the directory; every call ends in time.

    Args:
        neighbours: the way to the parts.
        parts: how many there are.
        clock: the node's.
    """

    def __init__(self, neighbours: Neighbours, parts: int, clock: Clock) -> None:
        self._parts = [_Part(neighbours.part(number), clock) for number in range(parts)]

    @property
    def others(self) -> int:
        """Other nodes that hold chunks; 0 while a part could not say which."""
        if any(part.is_silent for part in self._parts):
            return 0
        return max(part.others for part in self._parts)

    async def tell(self, part: int, delta: Delta) -> DeltaReply | None:
        """Send a delta to a part; None if there is no answer. One at a time."""
        return await self._parts[part].tell(delta)

    async def lookup(
        self, keys: bytes, asking: str, cleared: int, within: float
    ) -> list[Holding] | None:
        """Which nodes hold which of a run of keys.

        Args:
            keys: 16 bytes each.
            asking: the id of the node that asks, which is left out.
            cleared: the last clear that this node has carried out; nodes that have missed it are
                left out.
            within: seconds.

        Returns:
            the holdings; None if a part that has to be asked does not answer in time.
        """
        rows = key_array(keys)
        asked = positions_by_part(rows, len(self._parts))
        if any(self._parts[part].is_silent for part in asked):
            return None
        answers = await asyncio.gather(
            *(
                self._parts[part].ask(
                    "lookup",
                    rows[positions].tobytes(),
                    asking,
                    cleared,
                    within=min(within, SILENT_SECONDS),
                )
                for part, positions in asked.items()
            )
        )
        found = [_HOLDINGS.decode(answer) for answer in answers if answer is not None]
        if len(found) < len(asked):
            return None
        if len(asked) == 1:
            return found[0]
        return merge(zip((p.tolist() for p in asked.values()), found, strict=True))

    async def clear(self, space: bytes, number: int = 0, old: bool = False) -> int | None:
        """Ask for a clear on all nodes (see ``DirectoryService.clear``): the number under which it
        was ordered; None if it was not accepted.
        """
        answer = await self._parts[0].ask("clear", space, number, old, within=SILENT_SECONDS)
        return None if answer is None else decode(answer, ClearDone).number

    async def rooms(self, asking: str) -> dict[str, int] | None:
        """Bytes that other nodes would take; None if the directory does not answer in time."""
        answer = await self._parts[0].ask("rooms", asking, within=SILENT_SECONDS)
        return None if answer is None else _ROOMS.decode(answer)


class _Part:
    """One part of the directory."""

    def __init__(self, neighbour: Neighbour, clock: Clock) -> None:
        self.ask = neighbour.ask
        self.others = 0
        self._clock = clock
        self._told_at: float | None = None

    @property
    def is_silent(self) -> bool:
        return (
            self._told_at is not None and self._clock.monotonic() > self._told_at + SILENT_SECONDS
        )

    async def tell(self, delta: Delta) -> DeltaReply | None:
        # A directory that hangs finds one message when it wakes up, not thousands.
        self._told_at = self._clock.monotonic()
        answer = await self.ask("delta", encode(delta), within=ANSWER_SECONDS)
        if answer is None:
            self.others = 0
            return None
        self._told_at = None
        reply = decode(answer, DeltaReply)
        self.others = reply.peers
        return reply
