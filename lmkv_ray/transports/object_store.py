"""Between any two nodes of a Ray cluster: the peer's actor returns batches, Ray carries them.

A batch is the return value of a call of the peer's actor, so it lies in the peer's object store, is
owned by us, and is freed when we drop it or die. We ask for a batch at a time and have a second one
under way while the first is copied into its slots: that bounds both object stores, and needs no
flow control. (A streaming generator would leave its state in the peer's actor when we die.)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from lmkv_ray.arena import ArenaReader, checksum
from lmkv_ray.clock import Clock
from lmkv_ray.fetch import Failure, Fetch, Outcome, failed, groups
from lmkv_ray.keys import key_array
from lmkv_ray.orders import Offer
from lmkv_ray.transports.answers import NoAnswerError, answer_of
from lmkv_ray.transports.base import Answer, Capabilities, PeerInfo
from lmkv_ray.transports.chunk_reader import BATCH_BYTES, CHANGED, ChunkBatch, ChunkReader
from lmkv_ray.transports.windows import in_windows
from lmkv_ray.waits import to_the_end

NAME = "object_store"
IN_FLIGHT = 2


class ObjectStoreServer:
    """Returns batches of chunks. See ``Server``.

    Args:
        reader: the arena.
    """

    name = NAME

    def __init__(self, reader: ArenaReader) -> None:
        self._chunks = ChunkReader(reader)

    def offer(self, reader: str) -> Offer:
        """There is nothing to know."""
        return Offer()

    async def answer(self, question: bytes) -> Answer:
        """The chunks of some keys, 16 bytes each."""
        return await asyncio.to_thread(self._chunks.read, key_array(question))


class ObjectStoreTransport:
    """Asks the peer's actor for batches. See ``Transport``.

    Args:
        clock: measures deadlines.
        batch_bytes: payload of one batch.
    """

    name = NAME
    capabilities = Capabilities(same_host=False, one_sided=False, verified=True)

    def __init__(self, clock: Clock, batch_bytes: int = BATCH_BYTES) -> None:
        self._clock = clock
        self._batch_bytes = batch_bytes

    def obstacle(self, peer: PeerInfo) -> str | None:
        """Why this transport cannot serve a peer: it always can."""
        return None

    async def fetch(self, peer: PeerInfo, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """Bring chunks; see ``Transport``."""
        deadline = self._clock.monotonic() + fetch.within
        windows = groups([len(d) for d in fetch.destinations], self._batch_bytes)
        bring = partial(self._bring, peer, fetch, deadline)
        async with contextlib.aclosing(in_windows(windows, bring, IN_FLIGHT)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def _bring(
        self, peer: PeerInfo, fetch: Fetch, deadline: float, window: range
    ) -> list[Outcome]:
        outcomes = await self._ask(peer, fetch, deadline, window)
        # Chunks are sent straight from the arena: they may have been replaced meanwhile.
        torn = [o.position for o in outcomes if o.failure is Failure.CORRUPT]
        if torn:
            again = {o.position: o for o in await self._ask(peer, fetch, deadline, torn)}
            outcomes = [again.get(o.position, o) for o in outcomes]
        return outcomes

    async def _ask(
        self, peer: PeerInfo, fetch: Fetch, deadline: float, wanted: Sequence[int]
    ) -> list[Outcome]:
        """One call of the peer for some positions, and its answer copied to where it belongs."""
        keys = fetch.keys[list(wanted)].tobytes()
        try:
            batch = await answer_of(lambda: peer.ask(NAME, keys), deadline, self._clock)
        except NoAnswerError as error:
            return failed(wanted, error.failure, error.detail)
        if not isinstance(batch, ChunkBatch):
            return failed(wanted, Failure.LOST, "the answer is no batch")
        return await to_the_end(partial(_land, batch, fetch, wanted))


def _land(batch: ChunkBatch, fetch: Fetch, group: Sequence[int]) -> list[Outcome]:
    """Copy the chunks of a batch into their destinations and verify them there."""
    if len(batch.nbytes) != len(group) or len(batch.checksums) != len(group):
        return failed(group, Failure.LOST, "the batch is not for the keys that were asked for")
    if batch.nbytes[batch.nbytes >= 0].tolist() != [len(chunk) for chunk in batch.chunks]:
        return failed(group, Failure.LOST, "the batch is shorter or longer than it says")
    outcomes, chunks = [], iter(batch.chunks)
    for position, nbytes, expected in zip(
        group, batch.nbytes.tolist(), batch.checksums.tolist(), strict=True
    ):
        if nbytes < 0:
            failure = Failure.CHANGED if nbytes == CHANGED else Failure.MISSING
            outcomes.append(Outcome(position, failure=failure))
            continue
        chunk = next(chunks)
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
