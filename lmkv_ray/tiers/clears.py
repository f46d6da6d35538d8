"""Clears that a tier has taken on and not carried out yet."""

from __future__ import annotations

from dataclasses import dataclass

from lmkv_ray.tenants import covering

MAX_SPACES = 1024
"""With more, everything is cleared."""
CLEAR_SECONDS = 1.0
"""A tier that takes longer to clear does it in the background; nothing is served meanwhile."""


@dataclass(frozen=True, eq=False)
class PendingClear:
    """One clear. Each is an object of its own, so that none is taken for another."""

    number: int
    """See ``Tier.clear``; of several clears of a space the highest."""


@dataclass(frozen=True)
class Unheard:
    """A clear by clusters that share the medium, which this node was not told of."""

    space: int | None
    """None: everything."""
    number: int
    """See ``Tier.clear``."""
    before: bool
    """It was there at the first look: a node that is back may have carried it out long ago."""


class PendingClears:
    """By space, None: everything. Oldest first, one for each space."""

    def __init__(self) -> None:
        self._pending: dict[int | None, PendingClear] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, space: int | None, number: int) -> None:
        """A clear is to be carried out, with all before it of the same chunks."""
        if space is None or None in self._pending or len(self._pending) >= MAX_SPACES:
            number = max([number, *(clear.number for clear in self._pending.values())])
            self._pending = {None: PendingClear(number)}
            return
        before = self._pending.pop(space, None)
        self._pending[space] = PendingClear(max(number, before.number if before else 0))

    def done(self, space: int | None, clear: PendingClear) -> None:
        """A clear was carried out. One of the same space that came meanwhile was not."""
        if self._pending.get(space) is clear:
            del self._pending[space]

    def items(self) -> list[tuple[int | None, PendingClear]]:
        """What is to be done, in this order."""
        return list(self._pending.items())

    def beside(self, problem: str | None) -> str | None:
        """A tier's problem, with what it means for clears."""
        waits = " What was cleared is not served; it is removed when this is over."
        return problem + waits if problem and self._pending else problem

    def covers(self, space: int) -> bool:
        """Whether chunks of a space must not be served."""
        return any(which in self._pending for which in covering(space))
