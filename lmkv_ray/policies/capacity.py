"""How many chunks fit."""

from __future__ import annotations


class ClassCapacity:
    """How many chunks fit: given, or concluded from how many there were.

    A size class has no fixed capacity: extents come and go, and some slots are always free or
    being filled. It is taken to be the most chunks there were at once in the last one to two turns,
    where a turn is as many additions as the capacity. So growth is seen at once, and a loss
    after the content was exchanged twice at most.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.value = fixed or 0
        self._fixed = fixed is not None
        self._peak = 0
        self._additions = 0

    def added(self, held: int) -> None:
        """A chunk was added, and ``held`` are there now."""
        if self._fixed:
            return
        self._peak = max(self._peak, held)
        self._additions += 1
        if self._additions > self.value:
            self.value, self._peak, self._additions = self._peak, held, 0
        elif held > self.value:
            self.value = held
