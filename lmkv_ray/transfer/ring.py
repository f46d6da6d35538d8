"""The ring of one lane: slots in the device's memory, and tables that say what passes.

A slot is used again when the last copy that used it has passed, by an event on the device: the host
need not be there. A table is read by the device while its step is under way, so it is taken and
given back by the host. It lies in registered host memory: an upload would wait in the copy engine
behind the other lane's bulk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.kernels import TARGET
from lmkv_ray.transfer.device import Device, Event, Memory


@dataclass(slots=True)
class Slot:
    """One slot of the ring."""

    address: int
    free: Event | None = None
    """Behind the last use; None: never used."""


@dataclass(frozen=True, slots=True)
class Table:
    """Room for the targets of one launch."""

    address: int
    targets: npt.NDArray[np.void]


class Ring:
    """Slots that are used in turn, and tables.

    Args:
        device: where the slots are.
        slots: how many.
        slot_bytes: size of each; 0: there is no memory behind the ring.
        tables: how many.
        targets: rows of a table.
    """

    def __init__(
        self, device: Device, *, slots: int, slot_bytes: int, tables: int, targets: int
    ) -> None:
        self.slot_bytes = slot_bytes
        self._memory: Memory | None = None
        self._registered: Memory | None = None
        self._slots: list[Slot] = []
        self._tables: list[Table] = []
        self._all: tuple[Table, ...] = ()
        self._turn = 0
        if not slot_bytes:
            return
        self._memory = device.allocate(slots * slot_bytes)
        self._slots = [Slot(self._memory.address + i * slot_bytes) for i in range(slots)]
        nbytes = targets * TARGET.itemsize
        self._registered = device.registered(tables * nbytes)
        rows = self._registered.host
        assert rows is not None
        for i in range(tables):
            view = rows[i * nbytes : (i + 1) * nbytes].view(TARGET)
            self._tables.append(Table(self._registered.address + i * nbytes, view))
        self._all = tuple(self._tables)

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        return len(self._slots) * self.slot_bytes

    @property
    def tables(self) -> int:
        """How many are free."""
        return len(self._tables)

    def next_slot(self) -> Slot:
        """The slot whose turn it is."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        return slot

    def take(self) -> Table:
        """A table for one step; there are as many as there may be steps."""
        return self._tables.pop()

    def give(self, table: Table) -> None:
        """Give a table back whose step is over."""
        self._tables.append(table)

    def reclaim(self) -> None:
        """Take all tables back; nothing is under way."""
        self._tables = list(self._all)
