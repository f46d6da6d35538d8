"""Which nodes take over the chunks of a node that leaves, or keep further copies of its chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import groupby

RUN = 64
"""Chunks that one order names at most: neighbours stay together, and no peer gets all of them."""


@dataclass(frozen=True, slots=True)
class Held:
    """A chunk of the node, and the other nodes that hold it."""

    key: bytes
    space: int
    slot_bytes: int
    pinned: bool = False
    elsewhere: frozenset[str] = frozenset()
    """Other nodes that hold it and stay."""


@dataclass(frozen=True, slots=True)
class Order:
    """Chunks that a peer is asked to fetch from the node."""

    node_id: str
    space: int
    slot_bytes: int
    pinned: bool
    keys: tuple[bytes, ...]


def plan_handoff(
    chunks: Iterable[Held], rooms: MutableMapping[str, int], copies: int = 1
) -> list[Order]:
    """Give every chunk as many copies on other nodes as it lacks, as far as they have room.

    The emptiest node takes the next run of chunks; so neighbours, which are of one prompt more
    often than not, stay together, and what many nodes take in is spread over them.

    Args:
        chunks: the most important first; room that is short goes to these.
        rooms: bytes that each other node would take; what is ordered is taken off.
        copies: on other nodes, for every chunk.
    """
    orders: list[Order] = []
    for _, group in groupby(chunks, key=_kind):
        for run in _runs(group):
            orders += _place(run, rooms, copies)
    return orders


def _place(run: list[Held], rooms: MutableMapping[str, int], copies: int) -> list[Order]:
    orders: list[Order] = []
    size, elsewhere = run[0].slot_bytes, run[0].elsewhere
    lacking = copies - len(elsewhere)
    takers: list[set[str]] = [set(elsewhere) for _ in run]
    for _ in range(max(lacking, 0)):
        i = 0
        while i < len(run):
            # A node that has a chunk already is not asked to fetch it again.
            fit = [node for node in rooms if rooms[node] >= size and node not in takers[i]]
            if not fit:
                i += 1
                continue
            best = max(fit, key=lambda node: (rooms[node], node))
            end = i + 1
            while end < len(run) and best not in takers[end] and end - i < rooms[best] // size:
                end += 1
            for taken in takers[i:end]:
                taken.add(best)
            rooms[best] -= (end - i) * size
            keys = tuple(chunk.key for chunk in run[i:end])
            orders.append(Order(best, run[0].space, size, run[0].pinned, keys))
            i = end
    return orders


def _kind(chunk: Held) -> tuple[int, int, bool, frozenset[str]]:
    return chunk.space, chunk.slot_bytes, chunk.pinned, chunk.elsewhere


def _runs(chunks: Iterator[Held]) -> Iterator[list[Held]]:
    run: list[Held] = []
    for chunk in chunks:
        run.append(chunk)
        if len(run) == RUN:
            yield run
            run = []
    if run:
        yield run
