"""Between any two nodes of a Ray cluster: the peer's actor returns batches, Ray carries them.

A batch is the return value of a call of the peer's actor, so it lies in the peer's object store, is
owned by us, and is freed when we drop it or die. We ask for a batch at a time and have a second one
under way while the first is copied into its slots: that bounds both object stores, and needs no
flow control.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable
from functools import partial

import numpy as np

from lmkv_ray.arena import checksum
from lmkv_ray.transports.base import (
    Capabilities,
    Failure,
    Fetch,
    Outcome,
    PeerInfo,
    groups,
    to_the_end,
)
from lmkv_ray.transports.chunk_reader import BATCH_BYTES, CHANGED, Batch

IN_FLIGHT = 2


class ObjectStoreTransport:
    """Asks the peer's actor for batches. See ``Transport``.

    Args:
        batch_bytes: payload of one batch.
    """

    name = "object_store"
    capabilities = Capabilities(same_host=False, one_sided=False, verified=True)

    def __init__(self, batch_bytes: int = BATCH_BYTES) -> None:
        self._batch_bytes = batch_bytes

    def obstacle(self, peer: PeerInfo) -> str | None:
        """Why this transport cannot serve a peer: it always can."""
        return None

    async def fetch(self, peer: PeerInfo, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """Bring chunks; see ``Transport``."""
        deadline = time.monotonic() + fetch.within
        waiting = deque(groups([len(d) for d in fetch.destinations], self._batch_bytes))
        asked: deque[tuple[range, asyncio.Task[Batch]]] = deque()
        try:
            while waiting or asked:
                while waiting and len(asked) < IN_FLIGHT:
                    group = waiting.popleft()
                    asked.append((group, asyncio.create_task(_ask(peer, fetch, group))))
                group, answer = asked[0]
                failure = await _wait(answer, deadline)
                if failure is not None:
                    break
                batch = answer.result()
                # No name may keep the answer, or its memory in the object store stays pinned.
                asked.popleft()
                del answer
                outcomes = await to_the_end(partial(_land, batch, fetch, group))
                del batch
                for outcome in outcomes:
                    yield outcome
            else:
                return
            # The first failure ends the fetch: what else was asked for would fail alike.
            for group in [*(group for group, _ in asked), *waiting]:
                for position in group:
                    yield Outcome(position, failure=failure[0], detail=failure[1])
        finally:
            for _, answer in asked:
                answer.cancel()
            await asyncio.gather(*(answer for _, answer in asked), return_exceptions=True)


async def _ask(peer: PeerInfo, fetch: Fetch, group: range) -> Batch:
    answer: Awaitable[Batch] = peer.read(fetch.keys[group.start : group.stop].tobytes())
    return await answer


async def _wait(answer: asyncio.Task[Batch], deadline: float) -> tuple[Failure, str] | None:
    """Wait for a batch; None, or why there is none."""
    await asyncio.wait([answer], timeout=max(deadline - time.monotonic(), 0))
    if not answer.done():
        return Failure.LATE, ""
    error = answer.exception()
    if error is None:
        return None
    # Whatever it is: the peer's death, its error, a broken network. Ray's errors are long texts
    # that end with the cause.
    cause = str(error).strip().rpartition("\n")[2]
    return Failure.LOST, f"{type(error).__name__}: {cause}"[:500]


def _land(batch: Batch, fetch: Fetch, group: range) -> list[Outcome]:
    """Copy the chunks of a batch into their destinations and verify them there."""
    sizes = np.maximum(batch.nbytes, 0)
    if len(sizes) != len(group) or len(batch.checksums) != len(group):
        return _lost(group, "the batch is not for the keys that were asked for")
    if sizes.sum() != len(batch.payload):
        return _lost(group, "the batch is shorter or longer than it says")
    outcomes, start = [], 0
    for position, nbytes, expected in zip(
        group, batch.nbytes.tolist(), batch.checksums.tolist(), strict=True
    ):
        if nbytes < 0:
            failure = Failure.CHANGED if nbytes == CHANGED else Failure.MISSING
            outcomes.append(Outcome(position, failure=failure))
            continue
        chunk = batch.payload[start : start + nbytes]
        start += nbytes
        destination = fetch.destinations[position]
        if nbytes > len(destination):
            outcomes.append(Outcome(position, failure=Failure.TOO_LARGE))
            continue
        destination[:nbytes] = chunk
        if checksum(destination[:nbytes]) == expected:
            outcomes.append(Outcome(position, nbytes, expected))
        else:
            outcomes.append(Outcome(position, failure=Failure.CORRUPT))
    return outcomes


def _lost(group: range, detail: str) -> list[Outcome]:
    return [Outcome(position, failure=Failure.LOST, detail=detail) for position in group]
