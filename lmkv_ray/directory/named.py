"""A table of chunks whose holders have names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

from lmkv_ray.directory.table import NO_NODE, ChunkTable
from lmkv_ray.keys import KeyArray

N = TypeVar("N")


class NamedTable(Generic[N]):
    """Gives numbers to holders. One holder may have several numbers; each is used for one life.

    Args:
        capacity: chunks it remembers at most.
    """

    def __init__(self, capacity: int) -> None:
        self.table = ChunkTable(capacity)
        self._names: dict[int, N] = {}

    def __len__(self) -> int:
        """Numbers that are in use."""
        return len(self._names)

    def new_number(self, name: N) -> int:
        """A number that names a holder from now on."""
        number = next(
            n for n in range(NO_NODE) if n not in self._names and not self.table.is_retired(n)
        )
        self._names[number] = name
        return number

    def names(self) -> dict[int, N]:
        """Holders by number."""
        return dict(self._names)

    def validate(self) -> None:
        """Compare numbers and table with each other, for tests and simulations.

        Raises:
            AssertionError: something does not hold; the text says what.
        """
        self.table.validate()
        named = self.table.numbers()
        assert named <= self._names.keys(), f"{named - self._names.keys()} have chunks and no name"

    def retire(self, number: int) -> None:
        """The number names no holder any more, and holds no chunks."""
        if number != NO_NODE:
            self.table.retire(number)
            del self._names[number]

    def lookup(self, keys: KeyArray) -> Iterator[tuple[N, list[int]]]:
        """Holders and the positions of the keys they hold, number by number."""
        holders = self.table.lookup(keys)
        where, lanes = np.nonzero(holders != NO_NODE)
        numbers = holders[where, lanes].astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        numbers, where = numbers[order], where[order]
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for first, positions in zip(firsts, np.split(where, firsts[1:]), strict=False):
            yield self._names[int(numbers[first])], positions.tolist()
