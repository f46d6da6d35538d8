"""Who holds which chunks of a run: the answer to a lookup, whole or from several parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lmkv_ray.messages import Message


class Holding(Message, frozen=True):
    """Directory to shard: what one other node holds of a run of chunks."""

    node_id: str
    run: int
    """Leading chunks of the request that it holds without a gap."""
    positions: list[int]
    """All chunks of the request that it holds, ascending."""

    @staticmethod
    def ranked(found: Mapping[str, Iterable[int]]) -> list[Holding]:
        """Holdings from positions by node, longest leading run first."""
        holdings = []
        for node_id, held in found.items():
            positions = sorted(held)
            run = len(positions)
            if positions[-1] >= run:
                run = next(i for i, at in enumerate(positions) if i != at)
            holdings.append(Holding(node_id=node_id, run=run, positions=positions))
        holdings.sort(key=lambda its: (-its.run, -len(its.positions), its.node_id))
        return holdings


def merge(answers: Iterable[tuple[Sequence[int], Sequence[Holding]]]) -> list[Holding]:
    """One answer from those of several parts.

    Args:
        answers: (positions in the whole request of the keys a part was asked for, its answer).
    """
    found: dict[str, list[int]] = {}
    for asked, holdings in answers:
        for holding in holdings:
            found.setdefault(holding.node_id, []).extend(asked[i] for i in holding.positions)
    return Holding.ranked(found)
