"""Which processes may write into the slots of an owner: itself, and its workers or helpers.

An engine's scheduler owns the slots, its workers write into them, and each may outlive the others
(stopped in the middle of a copy, it goes on later). So slots are given away when all of a crew have
ended. The table lies in the arena, because a successor of the shard must know it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena.owners import is_alive
from lmkv_ray.errors import ArenaError
from lmkv_ray.messages import Owner

CREW = np.dtype(
    [
        ("owner_pid", "u4"),  # 0: the row is free
        ("pid", "u4"),
        ("owner_start", "u8"),
        ("owner_engine", "u8"),
        ("start", "u8"),
    ]
)
ROWS = 1024
"""Processes of all engines of a node together."""


class Crews:
    """The table, and a copy of it in memory.

    Args:
        table: CREW[ROWS], as the predecessor left it; zeroed memory is an empty one.
        is_alive: whether a process of this machine may still write.
    """

    def __init__(
        self, table: npt.NDArray[np.void], is_alive: Callable[[Owner], bool] = is_alive
    ) -> None:
        self._table = table
        self._is_alive = is_alive
        self._rows: dict[tuple[Owner, Owner], int] = {}
        for row in np.flatnonzero(table["owner_pid"]).tolist():
            owner_pid, pid, owner_start, engine, start = table[row].tolist()
            owner = Owner(pid=owner_pid, start=owner_start, engine=engine)
            self._rows[owner, Owner(pid=pid, start=start)] = row

    def owners(self) -> set[Owner]:
        """All owners whose crew is known."""
        return {owner for owner, _ in self._rows}

    def join(self, owner: Owner, processes: Iterable[Owner]) -> None:
        """Note processes that may write into the owner's slots, before they do.

        Raises:
            ArenaError: there is no room for so many.
        """
        self._forget(
            (owned_by, member)
            for owned_by, member in self._rows
            if owned_by == owner and not self._is_alive(member)
        )
        new = [member for member in dict.fromkeys(processes) if (owner, member) not in self._rows]
        free = np.flatnonzero(self._table["owner_pid"] == 0).tolist()
        if len(new) > len(free):
            raise ArenaError(
                f"More than {ROWS} processes would write into one arena.",
                next_step="run fewer engines on this node.",
            )
        for row, member in zip(free, new, strict=False):
            entry = self._table[row : row + 1]
            entry["pid"], entry["start"] = member.pid, member.start
            entry["owner_start"], entry["owner_engine"] = owner.start, owner.engine
            entry["owner_pid"] = owner.pid  # last: a row counts when it is whole
            self._rows[owner, member] = row

    def alive(self, owner: Owner) -> bool:
        """Whether any process that may write into the owner's slots may still do so."""
        return self._is_alive(owner) or any(
            self._is_alive(member) for owned_by, member in self._rows if owned_by == owner
        )

    def dismiss(self, owner: Owner) -> None:
        """Forget an owner."""
        self._forget((owned_by, member) for owned_by, member in self._rows if owned_by == owner)

    def _forget(self, pairs: Iterable[tuple[Owner, Owner]]) -> None:
        for pair in list(pairs):
            self._table["owner_pid"][self._rows.pop(pair)] = 0
