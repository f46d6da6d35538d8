"""Between two shards of one host: copy straight from arena to arena."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaReader, Hits
from lmkv_ray.clock import Clock
from lmkv_ray.errors import ArenaError
from lmkv_ray.fetch import Failure, Fetch, Outcome, groups
from lmkv_ray.host import host_id
from lmkv_ray.transports.base import Capabilities, PeerInfo
from lmkv_ray.waits import to_the_end

STEP_BYTES = 8 << 20
"""Copied between two looks at the clock; 1 to 2 ms."""


class SharedMemoryTransport:
    """Maps the peer's arena for the time of a fetch. See ``Transport``.

    Args:
        clock: measures deadlines.
        host: the ``host_id`` of this machine, if it is known already.
    """

    name = "shared_memory"
    capabilities = Capabilities(same_host=True, one_sided=True, verified=False)

    def __init__(self, clock: Clock, host: str | None = None) -> None:
        self._clock = clock
        self._host = host or host_id()

    def obstacle(self, peer: PeerInfo) -> str | None:
        """Why this transport cannot serve a peer; tries it."""
        if peer.host != self._host:
            return "the peer is on another host (or in another container, or of another user)"
        try:
            ArenaReader.attach(peer.arena_path, peer.arena_id).close()
        except ArenaError as error:
            return error.what
        return None

    async def fetch(self, peer: PeerInfo, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """Bring chunks; see ``Transport``."""
        deadline = self._clock.monotonic() + fetch.within
        # Attached for each fetch: a mapping that we kept would keep a dead peer's memory too.
        try:
            reader = ArenaReader.attach(peer.arena_path, peer.arena_id)
        except ArenaError as error:
            for position in range(len(fetch.keys)):
                yield Outcome(position, failure=Failure.LOST, detail=error.what)
            return
        try:
            for group in groups([len(d) for d in fetch.destinations], STEP_BYTES):
                if self._clock.monotonic() >= deadline:
                    outcomes = [Outcome(i, failure=Failure.LATE) for i in group]
                else:
                    outcomes = await to_the_end(partial(_copy, reader, fetch, group))
                for outcome in outcomes:
                    yield outcome
        finally:
            reader.close()


def _copy(reader: ArenaReader, fetch: Fetch, group: range) -> list[Outcome]:
    """Copy some chunks of a fetch and validate them."""
    hits = reader.lookup(fetch.keys[group.start : group.stop])
    checksums = reader.checksums(hits.slots * hits.found)
    outcomes, copied = [], []
    for row, position in enumerate(group):
        failure = _copy_one(reader, hits, row, fetch.destinations[position])
        if failure is None:
            copied.append(row)
        outcomes.append(Outcome(position, failure=failure))
    rows = np.array(copied, np.int64)
    intact = reader.unchanged(hits.slots[rows], hits.generations[rows])
    for row, same in zip(copied, intact.tolist(), strict=True):
        outcomes[row] = (
            Outcome(group[row], int(hits.nbytes[row]), int(checksums[row]))
            if same
            else Outcome(group[row], failure=Failure.CHANGED)
        )
    return outcomes


def _copy_one(
    reader: ArenaReader, hits: Hits, row: int, destination: npt.NDArray[np.uint8]
) -> Failure | None:
    if hits.slots[row] < 0:
        return Failure.MISSING
    size, start = int(hits.nbytes[row]), int(hits.offsets[row])
    if size > len(destination):
        return Failure.TOO_LARGE
    destination[:size] = reader.data[start : start + size]
    return None
