"""Which locations hold which chunks of a run: the answer to a lookup, merged from several parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lmkv_ray.messages import Message

GPU = "gpu"
"""The tier of an engine's own prefix cache."""
MEMORY = "memory"
"""The tier of the arena."""


class Location(NamedTuple):
    """Where chunks can be."""

    node_id: str
    tier: str = MEMORY
    """``gpu``, ``memory``, or the name of a tier below."""
    engine_id: str = ""
    """The engine on whose device the chunks are, if the tier is ``gpu``."""


class Holding(Message, frozen=True):
    """Directory to shard: what one location holds of a run of chunks."""

    node_id: str
    run: int
    """Leading chunks of the request that it holds without a gap."""
    positions: list[int]
    """All chunks of the request that it holds, ascending."""
    tier: str = MEMORY
    engine_id: str = ""

    @property
    def location(self) -> Location:
        """The location that holds these chunks."""
        return Location(self.node_id, self.tier, self.engine_id)

    @staticmethod
    def ranked(found: Mapping[Location, Iterable[int]]) -> list[Holding]:
        """Holdings from positions by location, longest leading run first."""
        holdings = []
        for location, held in found.items():
            positions = sorted(held)
            run = len(positions)
            if positions[-1] >= run:
                run = next(i for i, at in enumerate(positions) if i != at)
            holdings.append(
                Holding(
                    node_id=location.node_id,
                    run=run,
                    positions=positions,
                    tier=location.tier,
                    engine_id=location.engine_id,
                )
            )
        holdings.sort(key=lambda held: (-held.run, -len(held.positions), held.location))
        return holdings


def merge(answers: Iterable[tuple[Sequence[int], Sequence[Holding]]]) -> list[Holding]:
    """One answer from those of several parts.

    Args:
        answers: for each part: (positions in the whole request of the keys it was asked for, the
            part's answer).
    """
    found: dict[Location, list[int]] = {}
    for asked, holdings in answers:
        for holding in holdings:
            found.setdefault(holding.location, []).extend(asked[i] for i in holding.positions)
    return Holding.ranked(found)
