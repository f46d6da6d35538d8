"""The fetching side: find or locate, read one-sided, verified."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaWriter
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import decode
from lmkv_ray.transports.asking import NoAnswerError, answer_of
from lmkv_ray.transports.base import (
    Capabilities,
    Failure,
    Fetch,
    Outcome,
    PeerInfo,
    groups,
    to_the_end,
)
from lmkv_ray.transports.chunk_reader import CHANGED
from lmkv_ray.transports.nixl.found import Found
from lmkv_ray.transports.nixl.helper import Helper, HelperError
from lmkv_ray.transports.nixl.source import Located
from lmkv_ray.transports.nixl.wire import (
    LOOK_MOST,
    ROW,
    Arrived,
    Command,
    Look,
    Looked,
    Meet,
    Read,
    Result,
)
from lmkv_ray.transports.windows import failed, in_windows

logger = logging.getLogger(__name__)

WINDOW_BYTES = 8 << 20, 32 << 20
"""Read together, at first and at most: the first chunks are there soon, and what many cost is their
bytes, not the asking."""
IN_FLIGHT = 4
RETRY_SECONDS = 60.0
"""How long a peer is not read from after a READ has failed or hung."""
SLOW_SECONDS = 2e-3
"""A READ of a few bytes that takes longer had to wait for the peer: then asking is as quick."""
ASKING_SECONDS = 300.0
"""For how long a peer is asked then."""


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

    A fetch takes three round trips and nobody's help: our process reads where the peer's index has
    the keys, the rows of those slots, and, in windows, the chunks, which are verified where they
    have arrived. Bytes that have the checksum are right, whatever happened to the slot meanwhile.

    A window that this does not settle takes two: the peer's actor says where its chunks are and
    what their checksums are, and our process reads them. That is so at first, when its tables are
    not known; for chunks whose checksum was not noted yet; for what is not there, or has changed
    (only an actor knows); and where the network has no hardware that reads memory, as then the
    peer's process has to be woken for each READ.

    A READ that still runs at the deadline gets a second, then our process is ended: only that makes
    sure that nothing is written into the slots any more (see the package). So a peer that hangs in
    the middle of a READ costs its reader a second, and other fetches that are under way their
    chunks. Reads from a peer that died fail at once, and its agent is removed. A peer that a READ
    failed or hung with is left to other transports for a minute: maybe only UCX cannot reach it.

    Args:
        arena: ours; destinations of fetches are views that ``payload`` gave.
        helper: a process that reads into it.
        window_bytes: payload of the first window, and of the largest.
    """

    name = "nixl"
    capabilities = Capabilities(same_host=False, one_sided=False, verified=True)

    def __init__(
        self, arena: ArenaWriter, helper: Helper, window_bytes: tuple[int, int] = WINDOW_BYTES
    ) -> None:
        self._arena = arena
        self._helper = helper
        self._window_bytes = window_bytes
        self._known: dict[str, _Known] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._ask_until: dict[str, float] = {}

    def obstacle(self, peer: PeerInfo) -> str | None:
        """Why this transport cannot serve a peer; gets ready if it can."""
        problem = self._helper.problem
        if problem is not None:
            return problem
        if peer.locate is None:
            return "the peer does not offer it"
        if peer.nixl_obstacle is not None:
            return f"the peer says: {peer.nixl_obstacle}"
        at, why = self._failed.get(peer.node_id, (-RETRY_SECONDS, ""))
        if time.monotonic() < at + RETRY_SECONDS:
            return f"a READ has just failed: {why}"
        self._helper.start()
        return None

    async def fetch(self, peer: PeerInfo, fetch: Fetch) -> AsyncGenerator[Outcome, None]:
        """Bring chunks; see ``Transport``."""
        deadline = time.monotonic() + fetch.within
        first, largest = self._window_bytes
        windows = groups([len(d) for d in fetch.destinations], largest, first)
        looked = await self._look(peer, fetch.keys, deadline)
        bring = partial(self._bring, peer, fetch, deadline, looked)
        async with contextlib.aclosing(in_windows(windows, bring, IN_FLIGHT)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def _bring(
        self, peer: PeerInfo, fetch: Fetch, deadline: float, looked: Found, window: range
    ) -> list[Outcome]:
        keys = fetch.keys[window.start : window.stop]
        try:
            found = looked.part(window)
            unknown = np.flatnonzero(found.nbytes == 0)
            if len(unknown):
                found.fill(unknown, await self._locate(peer, keys[unknown], deadline))
            outcomes = {}
            wanted = []
            for i, position in enumerate(window):
                nbytes = int(found.nbytes[i])
                failure = None
                if nbytes < 0:
                    failure = Failure.CHANGED if nbytes == CHANGED else Failure.MISSING
                elif nbytes > len(fetch.destinations[position]):
                    failure = Failure.TOO_LARGE
                else:
                    wanted.append(i)
                outcomes[i] = Outcome(position, failure=failure)
            slots = [fetch.destinations[window[i]] for i in wanted]
            intact = await self._read(peer, found, wanted, slots, deadline) if wanted else b""
            damaged = []
            for i, good in zip(wanted, intact, strict=True):
                if good:
                    nbytes, value = int(found.nbytes[i]), int(found.checksums[i])
                    outcomes[i] = Outcome(window[i], nbytes, value)
                else:
                    damaged.append(i)
            if damaged:  # evicted meanwhile, or worse?
                now = await self._locate(peer, keys, deadline)
                for i in damaged:
                    same = now.generations[i] == found.generations[i]
                    same &= now.offsets[i] == found.offsets[i]  # its extent may be cut anew
                    failure = Failure.CORRUPT if same else Failure.CHANGED
                    outcomes[i] = Outcome(window[i], failure=failure)
            return [outcomes[i] for i in range(len(window))]
        except NoAnswerError as error:
            return failed(window, error.failure, error.detail)

    async def _look(self, peer: PeerInfo, keys: KeyArray, deadline: float) -> Found:
        """What the peer's tables say, read by ourselves."""
        found = Found.unknown(len(keys))
        known = self._current(peer)
        asking = time.monotonic() < self._ask_until.get(peer.node_id, 0)
        if known is None or asking or not len(keys):
            return found
        command = Look(agent=known.agent, keys=keys[:LOOK_MOST].tobytes())
        try:
            looked = await self._call(peer, command, deadline)
        except NoAnswerError:
            if time.monotonic() < deadline:
                # Its agent is gone, but there may be a new one: its actor knows.
                self._failed.pop(peer.node_id, None)
            return found
        assert isinstance(looked, Looked)
        if looked.seconds > SLOW_SECONDS:
            logger.info(
                "Node %s has to be woken to be read from (%.1f ms): for %.0f s it is asked instead",
                peer.node_id, 1000 * looked.seconds, ASKING_SECONDS,
            )  # fmt: skip
            self._ask_until[peer.node_id] = time.monotonic() + ASKING_SECONDS
        n = min(len(keys), LOOK_MOST)
        found.fill(np.arange(n), Found.of(looked, n))
        return found

    async def _locate(self, peer: PeerInfo, keys: KeyArray, deadline: float) -> Found:
        """What the peer's actor says, whose agent our process knows then."""
        locate = peer.locate
        assert locate is not None, "obstacle"
        known = self._current(peer)
        version = known.version if known is not None else ""
        answer = await answer_of(lambda: locate(keys.tobytes(), version), deadline)
        try:
            located = decode(answer, Located)
            found = Found.of(located, len(keys))
        except (ValueError, msgspec.DecodeError) as error:
            raise NoAnswerError(Failure.LOST, f"the answer makes no sense: {error}") from None
        if located.tables is not None:
            before = self._known.get(peer.node_id)
            command = Meet(
                agent=located.agent,
                metadata=located.metadata,
                replaces=before.agent if before and before.agent != located.agent else "",
                tables=located.tables,
            )
            await self._call(peer, command, deadline)
            ours = self._helper.agent
            if ours is not None:
                known = _Known(ours.agent, peer.arena_id, located.agent, located.version)
                self._known[peer.node_id] = known
        return found

    async def _read(
        self,
        peer: PeerInfo,
        found: Found,
        wanted: Sequence[int],
        slots: Sequence[npt.NDArray[np.uint8]],
        deadline: float,
    ) -> bytes:
        """Which of the wanted chunks arrived intact in their slots, 1 or 0 each."""
        known = self._current(peer)
        if known is None:
            raise NoAnswerError(Failure.LOST, "its agent, or ours, has just gone")
        rows = np.empty((len(wanted), ROW), np.uint64)
        rows[:, 0] = [self._arena.offset_of(slot) for slot in slots]
        rows[:, 1] = found.offsets[wanted]
        rows[:, 2] = found.nbytes[wanted]
        rows[:, 3] = found.checksums[wanted]
        arrived = await self._call(peer, Read(agent=known.agent, rows=rows.tobytes()), deadline)
        assert isinstance(arrived, Arrived)
        return arrived.intact

    async def _call(self, peer: PeerInfo, command: Command, deadline: float) -> Result:
        """The answer of our process."""
        call = partial(self._helper.call, command, deadline)
        try:
            return await to_the_end(call, self._helper.executor)
        except HelperError as error:
            known = self._known.get(peer.node_id)
            if known is not None:
                self._known[peer.node_id] = replace(known, told="")
            if error.peer:
                self._failed[peer.node_id] = time.monotonic(), str(error)
            failure = Failure.LATE if error.late else Failure.LOST
            raise NoAnswerError(failure, str(error)) from None

    def _current(self, peer: PeerInfo) -> _Known | None:
        """What our process knows of a peer: if both are still those that spoke of it."""
        known, ours = self._known.get(peer.node_id), self._helper.agent
        if known is None or ours is None:
            return None
        same = (known.told, known.arena_id) == (ours.agent, peer.arena_id)
        return known if same else None
