"""Evicts chunks whose kind (category, uses, session) is least likely to be used again."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies.base import Clock, Policy
from lmkv_ray.policies.capacity import ClassCapacity
from lmkv_ray.policies.reuse import ReuseTimes

USES = 2
"""Uses of a chunk after the first that make it another kind; more are like so many."""
CATEGORIES = 16
"""Categories that are told apart; those that come later are one."""
PRIORITIES = 8
"""Priorities are cut to this, up and down."""
GHOSTS = 4
"""Evicted chunks that are watched for their next use, in capacities."""
SESSIONS = 1 << 16
"""Sessions that are remembered."""


class Kind(NamedTuple):
    """Chunks that are expected to behave alike."""

    category: str
    uses: int
    """How often used since it was first stored, up to ``USES``."""
    returned: bool
    """Its session had come back when it was stored."""


class _Queue(NamedTuple):
    kind: Kind
    priority: int


class Hinted(Policy):
    """Evicts what has the least chance of a use in the next minutes, as its like had.

    Chunks are told apart by category, by how often they were used, and by whether their session
    ever came back. For each kind the times between uses are learnt (see ``ReuseTimes``), also from
    chunks that were evicted and wanted again. Of one kind the least recently used goes first;
    between kinds the chance decides, doubled by each step of priority. Deadlines and pins are the
    business of wrappers.

    Choosing ``n`` victims costs a step for each kind that there is (at most 96 for each priority
    in use), and n times the logarithm of that.

    Args:
        clock: what times between uses are measured with.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queue_of: dict[bytes, _Queue] = {}
        self._queues: dict[_Queue, OrderedDict[bytes, float]] = {}
        """Chunks of each queue with the time of their last use, oldest first."""
        self._times: dict[Kind, ReuseTimes] = {}
        self._ghosts: OrderedDict[bytes, tuple[_Queue, float]] = OrderedDict()
        self._capacity = ClassCapacity()
        self._categories = {""}
        self._sessions: OrderedDict[str, bool] = OrderedDict()
        """Whether each came back."""
        self._session_of: dict[bytes, str] = {}

    def added(self, key: bytes, hints: Hints = NO_HINTS) -> None:
        now = self._clock()
        known = self._leave(key)
        if known is None:
            self._capacity.added(len(self) + 1)
            known = self._ghosts.pop(key, None)
        self._remember_session(key, hints.session)
        uses = 0
        if known is not None:
            queue, used_at = known
            self._times[queue.kind].reused(now - used_at)
            uses = min(queue.kind.uses + 1, USES)
        kind = Kind(self._category(hints.category), uses, self._sessions.get(hints.session, False))
        priority = max(-PRIORITIES, min(hints.priority, PRIORITIES))
        self._join(key, _Queue(kind, priority), now)

    def touched(self, keys: Iterable[bytes]) -> None:
        now = self._clock()
        for key in keys:
            known = self._leave(key)
            if known is None:
                continue
            (kind, priority), used_at = known
            self._times[kind].reused(now - used_at)
            if kind.uses < USES:
                kind = kind._replace(uses=kind.uses + 1)
            self._join(key, _Queue(kind, priority), now)
            session = self._session_of.get(key, "")
            if session in self._sessions:
                self._sessions[session] = True

    def removed(self, key: bytes) -> None:
        known = self._leave(key)
        if known is None:
            return
        self._session_of.pop(key, None)
        self._ghosts[key] = known
        now = self._clock()
        while len(self._ghosts) > GHOSTS * self._capacity.value:
            _, (queue, used_at) = self._ghosts.popitem(last=False)
            self._times[queue.kind].given_up(now - used_at)

    def order(self) -> Iterator[bytes]:
        now = self._clock()
        heads = []
        for number, (queue, chunks) in enumerate(self._queues.items()):
            rest = iter(chunks.items())
            key, used_at = next(rest)
            times, weight = self._times[queue.kind], 2.0**queue.priority
            worth = times.chance(now - used_at) * weight
            heads.append((worth, used_at, number, key, rest, times, weight))
        heapq.heapify(heads)
        while heads:
            _, _, number, key, rest, times, weight = heads[0]
            yield key
            following = next(rest, None)
            if following is None:
                heapq.heappop(heads)
            else:
                key, used_at = following
                worth = times.chance(now - used_at) * weight
                heapq.heapreplace(heads, (worth, used_at, number, key, rest, times, weight))

    def __len__(self) -> int:
        return len(self._queue_of)

    def _join(self, key: bytes, queue: _Queue, now: float) -> None:
        self._queue_of[key] = queue
        chunks = self._queues.get(queue)
        if chunks is None:
            chunks = self._queues[queue] = OrderedDict()
        chunks[key] = now
        if queue.kind not in self._times:
            self._times[queue.kind] = ReuseTimes()

    def _leave(self, key: bytes) -> tuple[_Queue, float] | None:
        """Take a chunk out of its queue; returns that and when it was last used."""
        queue = self._queue_of.pop(key, None)
        if queue is None:
            return None
        chunks = self._queues[queue]
        used_at = chunks.pop(key)
        if not chunks:
            del self._queues[queue]
        return queue, used_at

    def _category(self, name: str) -> str:
        if name not in self._categories:
            if len(self._categories) >= CATEGORIES:
                return ""
            self._categories.add(name)
        return name

    def _remember_session(self, key: bytes, session: str) -> None:
        if not session:
            self._session_of.pop(key, None)
            return
        self._session_of[key] = session
        if session not in self._sessions:
            self._sessions[session] = False
            if len(self._sessions) > SESSIONS:
                self._sessions.popitem(last=False)
