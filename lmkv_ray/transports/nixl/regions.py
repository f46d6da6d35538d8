"""What of our arena an agent has registered: it reads into that, and peers read from it."""

from __future__ import annotations

from typing import Any

from lmkv_ray.arena import SLOT, ArenaReader


class Regions:
    """Registers what is needed, once.

    Args:
        agent: NIXL's.
        reader: the arena.
    """

    def __init__(self, agent: Any, reader: ArenaReader) -> None:
        self._agent = agent
        self._tables = reader.map_tables()
        self._geometry = geometry = reader.geometry
        self._registered: set[int] = set()
        self._serves = False
        self.data = reader.data.ctypes.data
        """Addresses."""
        self.index = self._tables.ctypes.data
        self.slots = self.index + geometry.slots_offset - geometry.index_offset

    def serve(self, extents: set[int]) -> None:
        """As ``add``, and the index as a whole: peers may look keys up."""
        if not self._serves:
            self._register([(self.index, self.slots - self.index)])
            self._serves = True
        self.add(extents)

    def add(self, extents: set[int]) -> None:
        """Extents, and the rows of their slots.

        Extent by extent: what is not allocated yet must not be touched, and several regions are
        faster than a large one.

        Raises:
            Exception: of NIXL, for instance as no more may be locked in memory.
        """
        geometry = self._geometry
        nbytes, rows = geometry.extent_bytes, geometry.slots_per_extent * SLOT.itemsize
        new = sorted(extents - self._registered)
        if new:
            regions = [(self.data + extent * nbytes, nbytes) for extent in new]
            regions += [(self.slots + extent * rows, rows) for extent in new]
            self._register(regions)
            self._registered |= set(new)

    def _register(self, regions: list[tuple[int, int]]) -> None:
        self._agent.register_memory([(*region, 0, "") for region in regions], "DRAM")
