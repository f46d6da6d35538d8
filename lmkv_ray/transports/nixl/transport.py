"""The fetching side: the peer's actor says where chunks are, they are read one-sided, verified."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaWriter
from lmkv_ray.clock import Clock
from lmkv_ray.fetch import Failure, Fetch, Outcome, groups
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import decode, encode
from lmkv_ray.transports.answers import NoAnswerError, answer_of
from lmkv_ray.transports.base import Capabilities, PeerInfo
from lmkv_ray.transports.chunk_reader import CHANGED
from lmkv_ray.transports.nixl.helper import Helper, HelperError
from lmkv_ray.transports.nixl.peer_chunks import PeerChunks
from lmkv_ray.transports.nixl.server import Locate, Located
from lmkv_ray.transports.nixl.wire import NAME, Arrived, Command, Meet, Read, Result
from lmkv_ray.transports.windows import in_windows

logger = logging.getLogger(__name__)

Flags = npt.NDArray[np.bool_]

WINDOW_BYTES = 8 << 20, 32 << 20
"""Read together, at first and at most: the first chunks are there soon, and what many cost is their
bytes, not the asking."""
IN_FLIGHT = 4
RETRY_SECONDS = 60.0
"""How long a peer is not read from after a READ has failed or hung."""


@dataclass(frozen=True)
class _Known:
    """What our process was told about a peer's agent."""

    told: str
    """Our agent at that time; another one knows nothing of it. Empty: it is not to be trusted."""
    arena_id: int
    agent: str
    version: str


class NixlTransport:
    """Reads from the peer's arena into ours. See ``Transport``.

    A window takes two round trips: the peer's actor says where the chunks are and what their
    checksums are; our process reads them, without the peer's actor, and verifies them where they
    have arrived. Bytes that have the checksum are right, whatever happened to the slot meanwhile.

    A READ that still runs at the deadline gets a second, then our process is ended: only that makes
    sure that nothing is written into the slots any more (see the package). So a peer that hangs in
    the middle of a READ costs its reader a second, and other fetches that are under way their
    chunks. Reads from a peer that died fail at once, and its agent is removed. A peer that a READ
    failed or hung with is left to other transports for a minute: maybe only UCX cannot reach it.

    Args:
        arena: ours; destinations of fetches are views that ``payload`` gave.
        helper: a process that reads into it.
        clock: measures deadlines.
        window_bytes: payload of the first window, and of the largest.
    """

    name = NAME
    capabilities = Capabilities(same_host=False, one_sided=False, verified=True)

    def __init__(
        self,
        arena: ArenaWriter,
        helper: Helper,
        clock: Clock,
        window_bytes: tuple[int, int] = WINDOW_BYTES,
    ) -> None:
        self._clock = clock
        self._arena = arena
        self._helper = helper
        self._window_bytes = window_bytes
        self._known: dict[str, _Known] = {}
        self._failed: dict[str, tuple[float, str]] = {}

    def obstacle(self, peer: PeerInfo) -> str | None:
        """Why this transport cannot serve a peer; gets ready if it can."""
        problem = self._helper.problem
        if problem is not None:
            return problem
        at, why = self._failed.get(peer.node_id, (-RETRY_SECONDS, ""))
        if self._clock.monotonic() < at + RETRY_SECONDS:
            return f"a READ has just failed: {why}"
        self._helper.start()
        return self._helper.problem

    async def fetch(self, peer: PeerInfo, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """Bring chunks; see ``Transport``."""
        deadline = self._clock.monotonic() + fetch.within
        first, largest = self._window_bytes
        windows = groups([len(d) for d in fetch.destinations], largest, first)
        bring = partial(self._window, peer, fetch, deadline)
        async with contextlib.aclosing(in_windows(windows, bring, IN_FLIGHT)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def _window(
        self, peer: PeerInfo, fetch: Fetch, deadline: float, window: range
    ) -> list[Outcome]:
        keys = fetch.keys[window.start : window.stop]
        slots = fetch.destinations[window.start : window.stop]
        offsets = np.array([self._arena.offset_of(slot) for slot in slots], np.uint64)
        room = np.array([len(slot) for slot in slots])
        found, intact = PeerChunks.unknown(len(keys)), np.zeros(len(keys), np.bool_)
        now = PeerChunks.unknown(len(keys))
        silence: NoAnswerError | None = None
        try:
            found = await self._locate(peer, keys, deadline)
            wanted = np.flatnonzero(found.fitting(room))
            if len(wanted):
                rows = found.rows(wanted, offsets)
                intact[wanted] = await self._read(peer, rows, deadline)
            damaged = np.flatnonzero(found.fitting(room) & ~intact)
            if len(damaged):  # evicted meanwhile, or worse?
                now.fill(damaged, await self._locate(peer, keys[damaged], deadline))
        except NoAnswerError as error:
            silence = error
        same = now.generations == found.generations
        same &= now.offsets == found.offsets  # its extent may be cut anew
        outcomes = []
        for i, position in enumerate(window):
            nbytes, detail = int(found.nbytes[i]), ""
            if intact[i]:
                outcomes.append(Outcome(position, nbytes, int(found.checksums[i])))
                continue
            if nbytes < 0:
                failure = Failure.CHANGED if nbytes == CHANGED else Failure.MISSING
            elif nbytes > room[i]:
                failure = Failure.TOO_LARGE
            elif silence is not None:
                failure, detail = silence.failure, silence.detail
            else:
                failure = Failure.CORRUPT if same[i] else Failure.CHANGED
            outcomes.append(Outcome(position, failure=failure, detail=detail))
        return outcomes

    async def _locate(self, peer: PeerInfo, keys: KeyArray, deadline: float) -> PeerChunks:
        """What the peer's actor says, whose agent our process knows then."""
        known = self._current(peer)
        version = known.version if known is not None else ""
        question = encode(Locate(keys=keys.tobytes(), known=version))
        answer = await answer_of(lambda: peer.ask(NAME, question), deadline, self._clock)
        try:
            located = decode(answer, Located)
            found = PeerChunks.of(located, len(keys))
        except (ValueError, TypeError, msgspec.DecodeError) as error:
            raise NoAnswerError(Failure.LOST, f"the answer makes no sense: {error}") from None
        if located.metadata:
            before = self._known.get(peer.node_id)
            command = Meet(
                agent=located.agent,
                metadata=located.metadata,
                replaces=before.agent if before and before.agent != located.agent else "",
                data=located.data,
            )
            await self._call(peer, command, deadline)
            ours = self._helper.agent
            if ours is not None:
                known = _Known(ours.agent, peer.arena_id, located.agent, located.version)
                self._known[peer.node_id] = known
        return found

    async def _read(self, peer: PeerInfo, rows: npt.NDArray[np.uint64], deadline: float) -> Flags:
        """Which chunks arrived intact in their slots."""
        known = self._current(peer)
        if known is None:
            raise NoAnswerError(Failure.LOST, "its agent, or ours, has just gone")
        arrived = await self._call(peer, Read(agent=known.agent, rows=rows.tobytes()), deadline)
        assert isinstance(arrived, Arrived)
        return np.frombuffer(arrived.intact, np.bool_)

    async def _call(self, peer: PeerInfo, command: Command, deadline: float) -> Result:
        """The answer of our process."""
        try:
            return await self._helper.call(command, deadline)
        except HelperError as error:
            known = self._known.get(peer.node_id)
            if known is not None:
                self._known[peer.node_id] = replace(known, told="")
            if error.peer:
                self._failed[peer.node_id] = self._clock.monotonic(), str(error)
            failure = Failure.LATE if error.late else Failure.LOST
            raise NoAnswerError(failure, str(error)) from None

    def _current(self, peer: PeerInfo) -> _Known | None:
        """What our process knows of a peer: if both are still those that spoke of it."""
        known, ours = self._known.get(peer.node_id), self._helper.agent
        if known is None or ours is None:
            return None
        same = (known.told, known.arena_id) == (ours.agent, peer.arena_id)
        return known if same else None
