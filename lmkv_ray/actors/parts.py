"""The directory as a shard sees it: one actor, or several that share the keys."""

from __future__ import annotations

import asyncio
import time

import msgspec
import numpy as np
import numpy.typing as npt

from lmkv_ray.actors.named import NamedActor
from lmkv_ray.actors.names import directory_name
from lmkv_ray.directory import Holding, merge
from lmkv_ray.keys import KeyArray, key_array, parts_of
from lmkv_ray.messages import Cleared, Delta, DeltaReply, decode, encode

SILENT_SECONDS = 3.0
"""A directory that owes an answer for longer is not asked, nor waited for."""
ANSWER_SECONDS = 30.0
"""A delta that is not answered for so long is given up."""

_HOLDINGS = msgspec.msgpack.Decoder(list[Holding])
_ROOMS = msgspec.msgpack.Decoder(dict[str, int])


class Directory:
    """All parts of the directory; every call ends in time.

    Args:
        namespace: Ray's.
        parts: how many there are.
    """

    def __init__(self, namespace: str, parts: int) -> None:
        self._parts = [_Part(NamedActor(directory_name(n), namespace)) for n in range(parts)]

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
        """Who holds what; None if a part that has to be asked does not answer in time."""
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

    async def clear(self, space: bytes, number: int = 0) -> int | None:
        """Ask for a clear on all nodes (see ``DirectoryActor.clear``): the number under which it
        was ordered; None if it was not accepted.
        """
        answer = await self._parts[0].ask("clear", space, number, within=SILENT_SECONDS)
        return None if answer is None else decode(answer, Cleared).before

    async def rooms(self, asking: str) -> dict[str, int] | None:
        """Bytes that other nodes would take; None if the directory does not answer in time."""
        answer = await self._parts[0].ask("rooms", asking, within=SILENT_SECONDS)
        return None if answer is None else _ROOMS.decode(answer)


class _Part:
    """One actor of the directory."""

    def __init__(self, actor: NamedActor) -> None:
        self.ask = actor.ask
        self._told_at: float | None = None
        self.others = 0

    @property
    def is_silent(self) -> bool:
        return self._told_at is not None and time.monotonic() > self._told_at + SILENT_SECONDS

    async def tell(self, delta: Delta) -> DeltaReply | None:
        # A directory that hangs finds one message when it wakes up, not thousands.
        self._told_at = time.monotonic()
        answer = await self.ask("delta", encode(delta), within=ANSWER_SECONDS)
        if answer is None:
            self.others = 0
            return None
        self._told_at = None
        reply = decode(answer, DeltaReply)
        self.others = reply.peers
        return reply


def positions_by_part(keys: KeyArray, parts: int) -> dict[int, npt.NDArray[np.intp]]:
    """Which of the keys each part of the directory is to be asked for."""
    part_of = parts_of(keys, parts)
    return {part: np.flatnonzero(part_of == part) for part in np.unique(part_of).tolist()}
