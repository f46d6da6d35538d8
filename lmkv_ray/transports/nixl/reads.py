"""Reading chunks into our arena, and verifying what has arrived."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lmkv_ray.arena import ArenaReader, checksum
from lmkv_ray.transports.nixl.regions import Regions
from lmkv_ray.transports.nixl.transfers import Numbers, Transfers, descriptors
from lmkv_ray.transports.nixl.wire import ROW, Arrived, NotDone, PeerData, Read, Result

VERIFIERS = 4
"""Threads for what a network brings."""

Say = Callable[[Result], None]


class Reads:
    """Carries out ``Read``.

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

    def read(self, read: Read, peer: PeerData, say: Say) -> None:
        """Read chunks into our slots and compare their checksums; says ``Arrived`` or ``NotDone``.

        Args:
            read: what.
            peer: where its payloads are.
            say: takes the result, maybe in another thread.
        """
        rows = np.frombuffer(read.rows, np.uint64).reshape(-1, ROW)

        def failed(why: str) -> None:
            say(NotDone(why=why))

        def arrived(at_once: bool) -> None:
            """``at_once``: this thread has just copied the bytes, which are in its cache."""
            if at_once or not self._transfers:
                say(Arrived(intact=self._intact(rows)))
            else:  # more comes meanwhile
                self._verifiers.submit(lambda: say(Arrived(intact=self._intact(rows))))

        here, there = descriptors(rows, self._extent_bytes, peer.extent_bytes)
        extents = here[:, 0] // np.uint64(self._extent_bytes)
        try:
            self._regions.add(set(extents.tolist()))
        except Exception as error:  # for instance: more than may be locked in memory
            failed(f"{type(error).__name__}: {error}")
            return
        here[:, 0] += np.uint64(self._regions.address)
        there[:, 0] += np.uint64(peer.address)
        self._transfers.post(read.agent, here, there, arrived, failed)

    def _intact(self, rows: Numbers) -> bytes:
        return bytes(
            checksum(self._data[start : start + nbytes]) == expected
            for start, _, nbytes, expected in rows.tolist()
        )
