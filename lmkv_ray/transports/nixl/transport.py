"""The fetching side: locate, read one-sided, verified."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaWriter
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
from lmkv_ray.transports.nixl.helper import Helper, HelperError
from lmkv_ray.transports.nixl.source import Located, version_of
from lmkv_ray.transports.nixl.wire import ROW, Arrived, Read
from lmkv_ray.transports.windows import failed, in_windows

WINDOW_BYTES = 8 << 20, 32 << 20
"""Located and read together, at first and at most: the first chunks are there soon, and what many
cost is their bytes, not the asking."""
IN_FLIGHT = 4
RETRY_SECONDS = 60.0
"""How long a peer is not read from after a READ has failed or hung."""


@dataclass(frozen=True)
class _Known:
    """What our process was told about a peer's agent."""

    told: str
    """Our agent at that time; another one knows nothing of it."""
    agent: str
    regions: int


@dataclass(frozen=True)
class _Found:
    """A checked ``Located``, one element a key."""

    nbytes: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.uint64]
    generations: npt.NDArray[np.uint64]
    checksums: npt.NDArray[np.uint64]


class NixlTransport:
    """Reads from the peer's arena into ours. See ``Transport``.

    A window of chunks takes two round trips: the peer's actor says where its chunks are and what
    their checksums are, and our process reads and verifies them. Bytes that have the checksum are
    right, whatever happened to the slot meanwhile; so generations are only asked for again, to tell
    an eviction from damage, when they have not.

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
        bring = partial(self._bring, peer, fetch, deadline)
        async with contextlib.aclosing(in_windows(windows, bring, IN_FLIGHT)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def _bring(
        self, peer: PeerInfo, fetch: Fetch, deadline: float, window: range
    ) -> list[Outcome]:
        keys = fetch.keys[window.start : window.stop]
        try:
            located, found = await self._locate(peer, keys.tobytes(), deadline)
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
            rows = np.empty((len(wanted), ROW), np.uint64)
            rows[:, 0] = [self._arena.offset_of(fetch.destinations[window[i]]) for i in wanted]
            rows[:, 1] = found.offsets[wanted]
            rows[:, 2] = found.nbytes[wanted]
            rows[:, 3] = found.checksums[wanted]
            intact = await self._read(peer, located, rows, deadline) if wanted else b""
            damaged = []
            for i, good in zip(wanted, intact, strict=True):
                if good:
                    outcomes[i] = Outcome(window[i], int(found.nbytes[i]), int(found.checksums[i]))
                else:
                    damaged.append(i)
            if damaged:
                _, now = await self._locate(peer, keys.tobytes(), deadline)
                for i in damaged:
                    same = now.generations[i] == found.generations[i]
                    failure = Failure.CORRUPT if same else Failure.CHANGED
                    outcomes[i] = Outcome(window[i], failure=failure)
            return [outcomes[i] for i in range(len(window))]
        except NoAnswerError as error:
            return failed(window, error.failure, error.detail)

    async def _locate(self, peer: PeerInfo, keys: bytes, deadline: float) -> tuple[Located, _Found]:
        locate = peer.locate
        assert locate is not None, "obstacle"
        known = self._known.get(peer.node_id)
        version = ""
        if known is not None and self._is_current(known):
            version = version_of(known.agent, known.regions)
        answer = await answer_of(lambda: locate(keys, version), deadline)
        try:
            located = decode(answer, Located)
            return located, _checked(located, len(keys) // 16)
        except (ValueError, msgspec.DecodeError) as error:
            raise NoAnswerError(Failure.LOST, f"the answer makes no sense: {error}") from None

    async def _read(
        self, peer: PeerInfo, located: Located, rows: npt.NDArray[np.uint64], deadline: float
    ) -> bytes:
        """Which rows arrived intact, 1 or 0 each."""
        known = self._known.get(peer.node_id)
        command = Read(
            agent=located.agent,
            metadata=located.metadata,
            replaces=known.agent if known is not None and known.agent != located.agent else "",
            base=located.base,
            extent_bytes=located.extent_bytes,
            rows=rows.tobytes(),
        )
        call = partial(self._helper.call, command, deadline)
        try:
            result = await to_the_end(call, self._helper.executor)
        except HelperError as error:
            self._known.pop(peer.node_id, None)
            if error.peer:
                self._failed[peer.node_id] = time.monotonic(), str(error)
            failure = Failure.LATE if error.late else Failure.LOST
            raise NoAnswerError(failure, str(error)) from None
        assert isinstance(result, Arrived)
        ours = self._helper.agent
        if located.metadata and ours is not None:
            self._known[peer.node_id] = _Known(ours.agent, located.agent, located.regions)
        return result.intact

    def _is_current(self, known: _Known) -> bool:
        ours = self._helper.agent
        return ours is not None and ours.agent == known.told


def _checked(located: Located, n: int) -> _Found:
    """The arrays of an answer.

    Raises:
        ValueError: they are not for ``n`` keys.
    """
    found = _Found(
        np.frombuffer(located.nbytes, np.int64),
        np.frombuffer(located.offsets, np.uint64),
        np.frombuffer(located.generations, np.uint64),
        np.frombuffer(located.checksums, np.uint64),
    )
    for array in (found.nbytes, found.offsets, found.generations, found.checksums):
        if len(array) != n:
            raise ValueError("it is not for the keys that were asked for")
    if not located.extent_bytes > 0:
        raise ValueError("it has no extents")
    return found
