"""Which chunks to fetch from which source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Chunks to fetch from one source, in order."""

    source: str
    positions: tuple[int, ...]


def plan_fetches(
    missing: Sequence[int], holders: Iterable[tuple[str, Iterable[int]]]
) -> list[FetchPlan]:
    """Cover a run of chunks from as few sources as possible, longest run first.

    Args:
        missing: positions in the prompt that are not here, ascending; positions that are not
            named are here already.
        holders: (source, positions of the chunks it holds), best first among equals.

    Returns:
        fetches in the order of the prompt. They end before the first missing position that no
        source holds: what follows a gap cannot be used.
    """
    held = [(node, frozenset(positions)) for node, positions in holders]
    fetches: list[FetchPlan] = []
    i = 0
    while i < len(missing):
        best, reach = "", i
        for node, positions in held:
            end = i
            while end < len(missing) and missing[end] in positions:
                end += 1
            if end > reach:
                best, reach = node, end
        if reach == i:
            break
        fetches.append(FetchPlan(best, tuple(missing[i:reach])))
        i = reach
    return fetches
