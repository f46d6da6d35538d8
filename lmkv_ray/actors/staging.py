"""Bringing chunks from other nodes into the arena."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lmkv_ray.actors.core import Shard
from lmkv_ray.directory import Holding
from lmkv_ray.errors import TransportError
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import Commit, MissReason, Stage, StageReply
from lmkv_ray.shard import Fetch as Plan
from lmkv_ray.shard import plan_fetches
from lmkv_ray.transports import Failure, Fetch, PeerInfo, Transports

logger = logging.getLogger(__name__)

ROUNDS = 3
"""Times that one stage asks the directory: a holder may have lost what it was said to hold."""
WINDOW = 64
"""Chunks that one fetch reserves slots for at a time."""


class Peers(Protocol):
    """The other nodes."""

    async def lookup(self, keys: bytes, within: float) -> list[Holding] | None:
        """Who holds what; None if the directory does not answer in time."""
        ...

    async def peer(self, node_id: str, within: float) -> PeerInfo | None:
        """How to read from a node; None if it does not answer in time."""
        ...

    def forget(self, node_id: str) -> None:
        """What is known about a node was wrong."""
        ...


@dataclass(kw_only=True)
class StageCounters:
    """What was staged since the shard started."""

    staged: int = 0
    """Chunks that arrived."""
    staged_bytes: int = 0
    fetch_failed: int = 0
    """Chunks that a peer was asked for and did not deliver."""


@dataclass
class _Job:
    """One stage under way."""

    space: int
    slot_bytes: int
    keys: list[bytes]
    deadline: float
    clears: int
    """``Shard.clears`` when it began."""
    avoid: set[str] = field(default_factory=set)
    """Nodes that did not deliver."""
    reason: dict[bytes, MissReason] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


class Staging:
    """Fetches chunks once, however many engines ask for them.

    Args:
        shard: where to.
        peers: from whom.
        transports: how.
    """

    def __init__(self, shard: Shard, peers: Peers, transports: Transports) -> None:
        self.counters = StageCounters()
        self._shard = shard
        self._peers = peers
        self._transports = transports
        self._flights: dict[bytes, asyncio.Future[None]] = {}

    async def stage(self, stage: Stage) -> StageReply:
        """Return when all chunks are here, no more can come, or the deadline has passed."""
        state = self._shard.state
        engine = state.engine(stage.engine_id)
        if engine is None:
            return StageReply(ready=0, reason=MissReason.DETACHED)
        space, slot_bytes = engine
        deadline = time.monotonic() + stage.within
        keys = key_list(key_array(stage.keys))
        job = _Job(space, slot_bytes, keys, deadline, self._shard.clears)
        for _ in range(ROUNDS):
            missing = [i for i, key in enumerate(keys) if key not in state]
            if not missing or job.left <= 0 or job.clears != self._shard.clears:
                break
            others = [self._flights[keys[i]] for i in missing if keys[i] in self._flights]
            mine = [i for i in missing if keys[i] not in self._flights]
            progress = await self._fetch(job, mine) if mine else False
            if others:
                await asyncio.wait(others, timeout=max(job.left, 0))
            elif not progress:
                break
        return self._reply(job)

    def _reply(self, job: _Job) -> StageReply:
        state = self._shard.state
        missing = next((i for i, key in enumerate(job.keys) if key not in state), None)
        ready = len(job.keys) if missing is None else missing
        # Deepest first, as with all touches: arrival and fetch order say nothing about use.
        state.touch(b"".join(reversed(job.keys[:ready])))
        if missing is None:
            return StageReply(ready=ready, reason=None)
        key = job.keys[missing]
        reason = self._shard.why_missing(key)
        if reason is not MissReason.CLEARED:  # peers were cleared too; that explains all failures
            reason = job.reason.get(key, reason)
        if job.left <= 0 and reason in (MissReason.NEVER_STORED, MissReason.EVICTED):
            reason = MissReason.STAGE_TIMEOUT
        return StageReply(ready=ready, reason=reason)

    async def _fetch(self, job: _Job, missing: Sequence[int]) -> bool:
        """One attempt at some positions; whether there is any point in another."""
        keys = [job.keys[i] for i in missing]
        loop = asyncio.get_running_loop()
        flights = {key: loop.create_future() for key in keys}
        self._flights |= flights
        try:
            holdings = await self._peers.lookup(b"".join(keys), job.left)
            if holdings is None:
                job.reason |= dict.fromkeys(keys, MissReason.STAGE_TIMEOUT)
                return False
            plans = plan_fetches(
                range(len(keys)),
                [(h.node_id, h.positions) for h in holdings if h.node_id not in job.avoid],
            )
            if not plans:
                return False
            await asyncio.gather(*(self._fetch_from(job, keys, plan) for plan in plans))
            return True
        finally:
            for key, flight in flights.items():
                if self._flights.get(key) is flight:
                    self._land(key)

    async def _fetch_from(self, job: _Job, keys: list[bytes], plan: Plan) -> None:
        """Carry out a plan in windows of slots."""
        wanted = [keys[i] for i in plan.positions]
        peer = await self._peers.peer(plan.node_id, job.left)
        if peer is None:
            self._failed(job, plan.node_id, wanted, "it does not answer")
            return
        while wanted and job.left > 0 and job.clears == self._shard.clears:
            slots = self._shard.reserve(job.space, job.slot_bytes, min(len(wanted), WINDOW))
            window, wanted = wanted[: len(slots)], wanted[len(slots) :]
            if not slots:
                self._failed(job, None, wanted, "no slot is free")
                return
            try:
                if not await self._fill(job, peer, window, slots):
                    self._failed(job, None, wanted, "an earlier chunk did not arrive")
                    return
            finally:
                self._shard.release(job.space, job.slot_bytes, slots)
        job.reason |= dict.fromkeys(wanted, MissReason.STAGE_TIMEOUT)

    async def _fill(self, job: _Job, peer: PeerInfo, keys: list[bytes], slots: list[int]) -> bool:
        """Fetch into reserved slots, publishing each chunk as it arrives; whether all did."""
        fetch = Fetch(
            key_array(keys), [self._shard.writer.payload(slot) for slot in slots], job.left
        )
        try:
            transport = self._transports.choose(peer)
        except TransportError as error:
            self._failed(job, peer.node_id, keys, str(error))
            return False
        complete = True
        async with contextlib.aclosing(transport.fetch(peer, fetch)) as outcomes:
            async for outcome in outcomes:
                key, slot = keys[outcome.position], slots[outcome.position]
                if outcome.ok:
                    commit = Commit(slot=slot, key=key, nbytes=outcome.nbytes)
                    self._shard.commit(job.space, job.slot_bytes, [commit], [outcome.checksum])
                    self.counters.staged += 1
                    self.counters.staged_bytes += outcome.nbytes
                    self._land(key)
                    continue
                complete = False
                if outcome.failure is Failure.LATE:
                    job.reason[key] = MissReason.STAGE_TIMEOUT
                else:
                    detail = f"{outcome.failure} {outcome.detail}"
                    self._failed(job, peer.node_id, [key], detail)
                    if outcome.failure is Failure.LOST:
                        self._peers.forget(peer.node_id)
                        self._transports.forget(peer.node_id)
        return complete

    def _failed(self, job: _Job, node_id: str | None, keys: list[bytes], why: str) -> None:
        if node_id is not None and node_id not in job.avoid:
            job.avoid.add(node_id)
            logger.warning("lmkv_ray: fetching from node %s failed: %s", node_id, why)
        self.counters.fetch_failed += len(keys)
        for key in keys:
            job.reason.setdefault(key, MissReason.FETCH_FAILED)

    def _land(self, key: bytes) -> None:
        """The key is here or will not come by this flight: wake who waits for it."""
        flight = self._flights.pop(key, None)
        if flight is not None and not flight.done():
            flight.set_result(None)
