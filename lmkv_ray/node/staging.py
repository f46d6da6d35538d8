"""Bringing chunks from other nodes and from lower tiers into the arena."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmkv_ray.clock import Clock
from lmkv_ray.cost import SourceModels, choose
from lmkv_ray.fetch import Failure, Fetch
from lmkv_ray.hints import Hints
from lmkv_ray.keys import KEY_BYTES, key_array, key_list
from lmkv_ray.messages import Commit, MissReason, Stage, StageReply
from lmkv_ray.node.shard import Shard
from lmkv_ray.node.sources import Finder, Source, find_all
from lmkv_ray.shard import FetchPlan, plan_fetches
from lmkv_ray.tenants import namespace_of, tenant_within

logger = logging.getLogger(__name__)

ROUNDS = 3
"""Times that one stage asks which sources hold what: a holder may have lost what it was said to
hold."""
MAX_SECONDS = 600.0
"""That a stage may last."""
MAX_KEYS = 1 << 16
"""Of one stage; what follows is not brought."""
WINDOW = 64
"""Chunks that one fetch reserves slots for at a time."""


@dataclass(kw_only=True)
class StageCounters:
    """What was staged since the shard started."""

    staged: int = 0
    """Chunks that arrived."""
    staged_bytes: int = 0
    fetch_failed: int = 0
    """Chunks that a source was asked for and did not deliver."""
    left_to_compute: int = 0
    """Chunks that could have been fetched, but computing them was expected to be quicker."""
    expected_seconds: float = 0.0
    """Sum of what fetches were expected to take."""
    taken_seconds: float = 0.0
    """Sum of what the same fetches took."""


@dataclass
class _Job:
    """One stage under way."""

    space: int
    """Whose the chunks are."""
    slot_bytes: int
    nbytes: int | None
    """Of each chunk; None: not known."""
    keys: list[bytes]
    remaining: list[float]
    deadline: float
    clears: int
    """``Shard.clears`` when it began."""
    finders: Sequence[Finder]
    clock: Clock
    avoid: set[str] = field(default_factory=set)
    """Sources that did not deliver."""
    reason: dict[bytes, MissReason] = field(default_factory=dict)

    @property
    def namespace(self) -> int:
        """Under which the shard holds the slots: that of all tenants."""
        return namespace_of(self.space) or self.space

    @property
    def left(self) -> float:
        return self.deadline - self.clock.monotonic()


@dataclass
class _Room:
    """The slots that chunks are brought into; a quarter of the arena at most."""

    windows: int = 0
    """Those that have slots now."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    queue: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the stage whose turn it is: first come, first served, or the next window of a long
    prompt would always take what the last one has just released."""


class Staging:
    """Fetches chunks once, however many engines ask for them.

    Args:
        shard: where to.
        finders: know of sources that hold chunks, the quickest kind of source first.
    """

    def __init__(self, shard: Shard, finders: Sequence[Finder]) -> None:
        self.counters = StageCounters()
        self.models = SourceModels()
        """How long each source takes."""
        self._shard = shard
        self._finders = finders
        self._flights: dict[bytes, asyncio.Future[None]] = {}
        self._rooms: defaultdict[tuple[int, int], _Room] = defaultdict(_Room)
        """By namespace and size of slots."""

    async def stage(self, stage: Stage) -> StageReply:
        """Return when all chunks are here, no more can come, or the deadline has passed."""
        shard = self._shard
        engine = shard.state.engine(stage.engine_id)
        if engine is None:
            return StageReply(ready=0, reason=MissReason.DETACHED)
        space, slot_bytes = engine
        deadline = shard.clock.monotonic() + _bounded(stage.within)
        whole = min(len(stage.keys), MAX_KEYS * KEY_BYTES) // KEY_BYTES * KEY_BYTES
        keys = key_list(key_array(stage.keys[:whole]))
        remaining = stage.remaining if len(stage.remaining) == len(keys) + 1 else []
        if not all(0 <= seconds < math.inf for seconds in remaining):
            remaining = []
        space = tenant_within(space, stage.space)
        job = _Job(
            space,
            slot_bytes,
            stage.slot_bytes,
            keys,
            remaining,
            deadline,
            shard.clears,
            self._finders,
            shard.clock,
        )
        await self._bring(job)
        reply = self._reply(job)
        return shard.located(reply, b"".join(keys), stage.slot_bytes) if stage.locate else reply

    async def take(
        self, space: int, slot_bytes: int, keys: list[bytes], within: float, finder: Finder
    ) -> list[bytes]:
        """Fetch chunks that no engine asked for, whatever it costs.

        Returns:
            those that are here now.
        """
        shard = self._shard
        deadline = shard.clock.monotonic() + _bounded(within)
        job = _Job(space, slot_bytes, None, keys, [], deadline, shard.clears, [finder], shard.clock)
        await self._bring(job)
        return [key for key in keys if key in shard.state.chunks]

    async def _bring(self, job: _Job) -> None:
        keys, state = job.keys, self._shard.state
        for _ in range(ROUNDS):
            missing = [i for i, key in enumerate(keys) if key not in state.chunks]
            if not missing or job.left <= 0 or job.clears != self._shard.clears:
                break
            others = [self._flights[keys[i]] for i in missing if keys[i] in self._flights]
            mine = [i for i in missing if keys[i] not in self._flights]
            progress = await self._fetch(job, mine) if mine else False
            if others:
                await asyncio.wait(others, timeout=max(job.left, 0))
            elif not progress:
                break

    def _reply(self, job: _Job) -> StageReply:
        state = self._shard.state
        missing = next((i for i, key in enumerate(job.keys) if key not in state.chunks), None)
        ready = len(job.keys) if missing is None else missing
        # Deepest first, as with all touches: arrival and fetch order say nothing about use.
        state.chunks.touch(b"".join(reversed(job.keys[:ready])))
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
            found, all_answered = await find_all(
                job.finders, key_array(keys), job.deadline, job.clock, job.avoid
            )
            sources = {source.name: source for source in found}
            plans = plan_fetches(
                range(len(keys)), [(s.name, s.positions) for s in sources.values()]
            )
            covered = plans[-1].positions[-1] + 1 if plans else 0
            if not all_answered:
                job.reason |= dict.fromkeys(keys[covered:], MissReason.STAGE_TIMEOUT)
            plans = self._worthwhile(job, keys, missing, plans)
            if not plans:
                return False
            await asyncio.gather(*(self._carry_out(job, keys, p, sources[p.source]) for p in plans))
            return True
        finally:
            for key, flight in flights.items():
                if self._flights.get(key) is flight:
                    self._land(key)

    def _worthwhile(
        self, job: _Job, keys: list[bytes], missing: Sequence[int], plans: list[FetchPlan]
    ) -> list[FetchPlan]:
        """The part of the plans that is expected to be quicker than computing."""
        if not job.remaining or not plans:
            return plans
        arrival = np.zeros(len(job.keys))
        for plan in plans:
            nbytes = job.slot_bytes * np.arange(1, len(plan.positions) + 1)
            at = [missing[i] for i in plan.positions]
            arrival[at] = self.models[plan.source].seconds(nbytes)
        end = missing[plans[-1].positions[-1]] + 1  # no source holds the next one
        chunks = choose(arrival[:end], job.remaining[: end + 1]).chunks
        # A source that is left alone is never seen to be quick again: try it now and then.
        tried = [missing[p.positions[-1]] + 1 for p in plans if self.models[p.source].is_stale()]
        chunks = max([chunks, *tried])
        kept = []
        for plan in plans:
            wanted = tuple(i for i in plan.positions if missing[i] < chunks)
            dropped = plan.positions[len(wanted) :]
            self.counters.left_to_compute += len(dropped)
            job.reason |= dict.fromkeys((keys[i] for i in dropped), MissReason.CHEAPER_TO_COMPUTE)
            if wanted:
                kept.append(FetchPlan(plan.source, wanted))
        return kept

    async def _carry_out(
        self, job: _Job, keys: list[bytes], plan: FetchPlan, source: Source
    ) -> None:
        """Carry out a plan in windows of slots."""
        wanted = [keys[i] for i in plan.positions]
        model = self.models[source.name]
        while wanted and job.left > 0 and job.clears == self._shard.clears:
            slots = await self._reserve(job, min(len(wanted), WINDOW))
            if slots is None:
                break
            if not slots:
                self._failed(job, None, wanted, "no slot is free")
                return
            window, wanted = wanted[: len(slots)], wanted[len(slots) :]
            began, nbytes = self._shard.clock.monotonic(), len(slots) * job.slot_bytes
            expected = float(model.seconds(nbytes))
            unused = dict.fromkeys(slots)
            try:
                if not await self._fill(job, source, window, slots, unused):
                    self._failed(job, None, wanted, "an earlier chunk did not arrive")
                    return
            finally:
                self._release(job, unused)
            taken = self._shard.clock.monotonic() - began
            model.observe(nbytes, taken)
            self.counters.expected_seconds += expected
            self.counters.taken_seconds += taken
        job.reason |= dict.fromkeys(wanted, MissReason.STAGE_TIMEOUT)

    async def _reserve(self, job: _Job, n: int) -> list[int] | None:
        """Up to ``n`` slots, in the order of asking; none if no stage is going to release any; None
        if it is too late.
        """
        room = self._rooms[job.namespace, job.slot_bytes]
        try:
            async with asyncio.timeout(job.left), room.queue:
                while job.clears == self._shard.clears:
                    slots = self._shard.reserve(job.namespace, job.slot_bytes, n)
                    if slots:
                        room.windows += 1
                    if slots or not room.windows:
                        return slots
                    room.released.clear()
                    await room.released.wait()
        except TimeoutError:
            pass
        return None

    def _release(self, job: _Job, slots: Iterable[int]) -> None:
        room = self._rooms[job.namespace, job.slot_bytes]
        room.windows -= 1
        room.released.set()
        self._shard.release(job.namespace, job.slot_bytes, slots)

    async def _fill(
        self,
        job: _Job,
        source: Source,
        keys: list[bytes],
        slots: list[int],
        unused: dict[int, None],
    ) -> bool:
        """Fetch into reserved slots, publishing each chunk as it arrives; whether all did.

        A slot that was committed leaves ``unused``: another stage may have reserved the slot by the
        time this one ends, and this one must not release it then.
        """
        views = [self._shard.writer.payload(slot) for slot in slots]
        fetch = Fetch(key_array(keys), views, job.left)
        before = dict(zip(job.keys[1:], job.keys, strict=False))
        complete = True
        async with contextlib.aclosing(source.fetch(fetch)) as outcomes:
            async for outcome in outcomes:
                key, slot = keys[outcome.position], slots[outcome.position]
                wrong = job.nbytes not in (None, outcome.nbytes)
                if outcome.ok and wrong:
                    # Written by a stranger: behind it the slot has the bytes of another chunk.
                    why = f"a chunk has {outcome.nbytes} bytes, not {job.nbytes}"
                    complete = False
                    self._failed(job, source.name, [key], why)
                    continue
                if outcome.ok:
                    hints = Hints(after=before.get(key, b""), space=job.space)
                    commit = Commit(slot=slot, key=key, nbytes=outcome.nbytes, hints=hints)
                    self._shard.commit(job.namespace, job.slot_bytes, [commit], [outcome.checksum])
                    unused.pop(slot, None)
                    self.counters.staged += 1
                    self.counters.staged_bytes += outcome.nbytes
                    self._land(key)
                    continue
                complete = False
                if outcome.failure is Failure.LATE:
                    job.reason[key] = MissReason.STAGE_TIMEOUT
                else:
                    self._failed(job, source.name, [key], f"{outcome.failure} {outcome.detail}")
        return complete

    def _failed(self, job: _Job, source: str | None, keys: list[bytes], why: str) -> None:
        if source is not None and source not in job.avoid:
            job.avoid.add(source)
            logger.warning("lmkv_ray: fetching from %s failed: %s", source, why)
        self.counters.fetch_failed += len(keys)
        for key in keys:
            job.reason.setdefault(key, MissReason.FETCH_FAILED)

    def _land(self, key: bytes) -> None:
        """The key is here or will not come by this flight: wake the stages that wait for it."""
        flight = self._flights.pop(key, None)
        if flight is not None and not flight.done():
            flight.set_result(None)


def _bounded(seconds: float) -> float:
    """Seconds to wait, whatever was asked for: NaN and what is negative is no time."""
    return min(seconds, MAX_SECONDS) if seconds > 0 else 0.0
