"""What of our arena an agent has registered: it reads into that, and peers read from it."""

from __future__ import annotations

from typing import Any

from lmkv_ray.arena import ArenaReader


class Regions:
    """Registers extents, each once.

    Extent by extent: what is not allocated yet must not be touched, and several regions are faster
    than a large one.

    Args:
        agent: NIXL's.
        reader: the arena.
    """

    def __init__(self, agent: Any, reader: ArenaReader) -> None:
        self._agent = agent
        self._extent_bytes = reader.geometry.extent_bytes
        self._registered: set[int] = set()
        self.address = reader.data.ctypes.data
        """Of the first payload."""

    def add(self, extents: set[int]) -> None:
        """Register what is not registered yet.

        Raises:
            Exception: of NIXL, for instance as no more may be locked in memory.
        """
        new = sorted(extents - self._registered)
        if new:
            nbytes = self._extent_bytes
            regions = [(self.address + extent * nbytes, nbytes, 0, "") for extent in new]
            self._agent.register_memory(regions, "DRAM")
            self._registered |= set(new)
