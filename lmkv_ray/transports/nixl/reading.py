"""Reading chunks into our arena, and verifying what has arrived."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lmkv_ray.arena import ArenaReader, DistantArena, checksum
from lmkv_ray.transports.nixl.regions import Regions
from lmkv_ray.transports.nixl.transfers import Numbers, Then, Transfers, descriptors
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

        def arrived(at_once: bool) -> None:
            self.verify(rows, at_once, lambda intact: say(Arrived(intact=intact)))

        self.post(read.agent, peer, rows, arrived, lambda why: say(Failed(why=why)))

    def post(
        self,
        agent: str,
        peer: DistantArena,
        rows: Numbers,
        then: Then,
        failed: Callable[[str], None],
        *more: tuple[Numbers, Numbers],
    ) -> None:
        """Read chunks into our slots; see ``Transfers.post``.

        Args:
            agent: the peer's.
            peer: its arena.
            rows: of ``Read``.
            then: see there.
            failed: also called when our slots cannot be registered.
            more: descriptors, here and there, to be read with them.
        """
        here, there = descriptors(rows, self._extent_bytes, peer.geometry.extent_bytes)
        extents = here[:, 0] // np.uint64(self._extent_bytes)
        try:
            self._regions.add(set(extents.tolist()))
        except Exception as error:  # for instance: more than may be locked in memory
            failed(f"{type(error).__name__}: {error}")
            return
        here[:, 0] += np.uint64(self._regions.data)
        there[:, 0] += np.uint64(peer.data)
        ours, theirs = (np.concatenate(side) for side in zip((here, there), *more, strict=True))
        self._transfers.post(agent, ours, theirs, then, failed)

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
