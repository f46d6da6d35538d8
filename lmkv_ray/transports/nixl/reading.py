"""Reading chunks into our arena, and verifying what has arrived."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lmkv_ray.arena import ArenaReader, DistantArena, checksum
from lmkv_ray.transports.nixl.regions import Regions
from lmkv_ray.transports.nixl.transfers import Numbers, Transfers, descriptors
from lmkv_ray.transports.nixl.wire import ROW, Arrived, Failed, Read, Result

VERIFIERS = 4
"""Threads for what a network brings."""

Say = Callable[[Result], None]


class Reading:
    """Carries out ``Read``, and what else reads chunks.

    Args:
        reader: our arena.
        regions: of it.
        transfers: carry out the READs.
    """

    def __init__(self, reader: ArenaReader, regions: Regions, transfers: Transfers) -> None:
        self._data = reader.data
        self._extent_bytes = reader.geometry.extent_bytes
        self._regions = regions
        self._transfers = transfers
        self._verifiers = ThreadPoolExecutor(VERIFIERS, "verify")

    def read(self, read: Read, peer: DistantArena, say: Say) -> None:
        """From known places; says ``Arrived`` or ``Failed``."""
        rows = np.frombuffer(read.rows, np.uint64).reshape(-1, ROW)
        here, there = self.spans(rows, peer)

        def arrived(at_once: bool) -> None:
            self.verify(rows, at_once, lambda intact: say(Arrived(intact=intact)))

        self._transfers.post(read.agent, here, there, arrived, lambda why: say(Failed(why=why)))

    def spans(self, rows: Numbers, peer: DistantArena) -> tuple[Numbers, Numbers]:
        """Descriptors, here and there, of registered memory; see ``descriptors``."""
        here, there = descriptors(rows, self._extent_bytes, peer.geometry.extent_bytes)
        self._regions.add(set((here[:, 0] // np.uint64(self._extent_bytes)).tolist()))
        here[:, 0] += np.uint64(self._regions.data)
        there[:, 0] += np.uint64(peer.data)
        return here, there

    def verify(self, rows: Numbers, at_once: bool, then: Callable[[bytes], None]) -> None:
        """Compare checksums with what is in the slots.

        Args:
            rows: of ``Read``.
            at_once: this processor has just copied the bytes, which are in its cache.
            then: takes 1 for each row whose bytes are intact, else 0; maybe in another thread.
        """
        if at_once or not self._transfers:
            then(self._intact(rows))
        else:  # more comes meanwhile
            self._verifiers.submit(lambda: then(self._intact(rows)))

    def _intact(self, rows: Numbers) -> bytes:
        return bytes(
            checksum(self._data[start : start + nbytes]) == expected
            for start, _, nbytes, expected in rows.tolist()
        )
