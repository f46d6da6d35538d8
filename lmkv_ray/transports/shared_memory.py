"""Between two shards of one host: copy straight from arena to arena."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaReader, Hits
from lmkv_ray.clock import Clock
from lmkv_ray.errors import ArenaError, TransportError
from lmkv_ray.fetch import Failure, Fetch, Outcome, groups
from lmkv_ray.host import host_id
from lmkv_ray.orders import Offer
from lmkv_ray.transports.base import Answer, Capabilities, PeerInfo
from lmkv_ray.waits import to_the_end

NAME = "shared_memory"
STEP_BYTES = 8 << 20
"""Copied between two looks at the clock; 1 to 2 ms."""


class SharedMemoryServer:
    """Says where the arena can be mapped. See ``Server``.

    Args:
        path: see ``ArenaReader.attach``.
    """

    name = NAME

    def __init__(self, path: str) -> None:
        self._path = path

    def offer(self, reader: str) -> Offer:
        """The arena's path."""
        return Offer(address=self._path.encode())

    async def answer(self, question: bytes) -> Answer:
        """Nothing is ever asked.

        Raises:
            TransportError: always.
        """
        raise TransportError(
            "Shared memory is read without questions.",
            next_step="run the same version of lmkv_ray on all nodes.",
        )


class SharedMemoryTransport:
    """Maps the peer's arena for the time of a fetch. See ``Transport``.

    Args:
        clock: measures deadlines.
        step_bytes: copied between two looks at the clock.
    """

    name = NAME
    capabilities = Capabilities(same_host=True, one_sided=True, verified=False)

    def __init__(self, clock: Clock, step_bytes: int = STEP_BYTES) -> None:
        self._clock = clock
        self._step_bytes = step_bytes
        self._host = host_id()

    def obstacle(self, peer: PeerInfo) -> str | None:
        """Why this transport cannot serve a peer; tries it."""
        if peer.host != self._host:
            return "the peer is on another host (or in another container, or of another user)"
        try:
            _attach(peer).close()
        except ArenaError as error:
            return error.what
        return None

    async def fetch(self, peer: PeerInfo, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """Bring chunks; see ``Transport``."""
        deadline = self._clock.monotonic() + fetch.within
        # Attached for each fetch: a mapping that we kept would keep a dead peer's memory too.
        try:
            reader = _attach(peer)
        except ArenaError as error:
            for position in range(len(fetch.keys)):
                yield Outcome(position, failure=Failure.LOST, detail=error.what)
            return
        try:
            for group in groups([len(d) for d in fetch.destinations], self._step_bytes):
                if self._clock.monotonic() >= deadline:
                    outcomes = [Outcome(i, failure=Failure.LATE) for i in group]
                else:
                    outcomes = await to_the_end(partial(_copy, reader, fetch, group))
                for outcome in outcomes:
                    yield outcome
        finally:
            reader.close()


def _attach(peer: PeerInfo) -> ArenaReader:
    path = peer.offers[NAME].address.decode(errors="replace")
    return ArenaReader.attach(path, peer.arena_id)


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
