"""The engine's line to the shard of its node: a thread that does all the talking.

The engine's thread only ever appends to queues and reads what has arrived; it never waits for the
link. Everything is bounded: what does not fit is dropped and counted by the caller. The link
survives its shard: on any error it says ``Hello`` again, with growing pauses, for as long as the
engine lives.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lmkv_ray.arena import ArenaReader
from lmkv_ray.errors import LmkvError
from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.keys import KEY_BYTES
from lmkv_ray.messages import (
    Commit,
    Exchange,
    ExchangeReply,
    Hello,
    Stage,
    StageReply,
    Welcome,
    decode,
    encode,
)
from lmkv_ray.vllm.device import DeviceWatch

logger = logging.getLogger(__name__)

RPC_SECONDS = 5.0
"""After this, an exchange with the shard counts as failed."""

RETRY_SECONDS = (0.1, 5.0)
"""First and longest pause before a new attempt to attach."""

HEARTBEAT_SECONDS = 1.0
"""How often a shard hears of an engine that has nothing to say but which chunks it used."""

MAX_TOUCHED = 65536
"""Keys waiting to be reported as used; the rest are forgotten (recency is only a hint)."""

MAX_STAGES = 64
"""Stage requests under way."""


class ShardClient(Protocol):
    """How to call a shard. Errors of any kind mean: not now, try again."""

    def call(self, method: str, payload: bytes) -> Future[bytes]:
        """Send; the future ends with the answer's bytes."""


@dataclass(slots=True)
class StageTicket:
    """A stage under way, or over."""

    deadline: float
    """``time.monotonic()`` after which nobody waits for it any more."""
    reply: StageReply | None = None
    over: bool = False


@dataclass(frozen=True, slots=True)
class Attachment:
    """A mapped arena."""

    path: str
    arena_id: int
    reader: ArenaReader


class GrantedSlot(NamedTuple):
    """A slot that may be filled."""

    slot: int
    arena_id: int
    """The arena it is a slot of."""
    deadline: float
    """``time.monotonic()``, after which nobody may begin to write."""


@dataclass(slots=True)
class _Outbox:
    commits: list[Commit] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    touched: deque[bytes] = field(default_factory=lambda: deque(maxlen=MAX_TOUCHED))


class ShardLink:
    """See the module.

    Args:
        connect: finds or starts the shard; may block and raise; called on the link's thread.
        hello: who this engine is (``held`` is filled in by the link).
        want_slots: free slots to keep at hand.
        period: seconds between exchanges when nothing is urgent.
        device: what the shard is told of the engine's own cache, if anything.
    """

    def __init__(
        self,
        connect: Callable[[], ShardClient],
        hello: Hello,
        *,
        want_slots: int,
        period: float,
        device: DeviceWatch | None = None,
    ) -> None:
        self._connect = connect
        self._hello = hello
        self._want_slots = want_slots
        self._period = period
        self._device = device
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._outbox = _Outbox()
        self._free: dict[int, float] = {}  # granted slots not in use, with their deadlines
        self._in_use: dict[int, float] = {}
        self._committing: set[bytes] = set()
        self._stages: deque[tuple[Stage, StageTicket]] = deque()
        self._staging = 0
        self._clearing = 0
        self._complaint = ""
        self._client: ShardClient | None = None
        self.attachment: Attachment | None = None
        """The arena, once attached. It stays readable while the shard is away."""
        self.peers = 0
        """Other nodes that hold chunks."""
        self._thread = threading.Thread(target=self._run, name="lmkv-link", daemon=True)
        self._thread.start()

    # -- the engine's thread: nothing here waits -------------------------------------------------

    def take_slot(self) -> GrantedSlot | None:
        """A granted slot, or None: there is none now."""
        now = time.monotonic()
        with self._lock:
            while self._free and self.attachment is not None:
                slot = next(iter(self._free))
                deadline = self._free.pop(slot)
                if deadline > now:
                    self._in_use[slot] = deadline
                    if self._wanted():
                        self._wake.set()
                    return GrantedSlot(slot, self.attachment.arena_id, deadline)
                self._outbox.released.append(slot)
            self._wake.set()
        return None

    def commit(self, slot: int, key: bytes, nbytes: int, hints: Hints = NO_HINTS) -> None:
        """Make a filled slot visible under its key."""
        with self._lock:
            if self._in_use.pop(slot, None) is not None:
                self._outbox.commits.append(Commit(slot=slot, key=key, nbytes=nbytes, hints=hints))
                self._committing.add(key)
                self._wake.set()

    def committing(self, key: bytes) -> bool:
        """Whether a commit of this key has not been answered yet."""
        return key in self._committing

    def release(self, slot: int) -> None:
        """Give a slot back unused. Nobody may write to it any more."""
        with self._lock:
            if self._in_use.pop(slot, None) is not None:
                self._outbox.released.append(slot)

    def touch(self, keys: list[bytes]) -> None:
        """Report chunks as used, deepest first."""
        with self._lock:
            self._outbox.touched.extend(keys)

    def stage(
        self, keys: bytes, within: float, remaining: Sequence[float] = ()
    ) -> StageTicket | None:
        """Ask for chunks from elsewhere; None if too much is under way already.

        Args:
            keys: of a run of chunks.
            within: seconds.
            remaining: see ``Stage``.
        """
        with self._lock:
            if self._client is None or self._staging >= MAX_STAGES:
                return None
            self._staging += 1
            ticket = StageTicket(time.monotonic() + within)
            request = Stage(
                engine_id=self._hello.engine_id,
                keys=keys,
                slot_bytes=self._hello.slot_bytes,
                within=within,
                remaining=list(remaining),
            )
            self._stages.append((request, ticket))
        self._wake.set()
        return ticket

    def clear(self) -> None:
        """Remove this engine's namespace from the cache; until done, ``clearing`` is true."""
        with self._lock:
            self._clearing += 1
        self._wake.set()

    @property
    def readable(self) -> Attachment | None:
        """The arena, if there is one and hits in it would not be stale."""
        return None if self.clearing else self.attachment

    @property
    def clearing(self) -> bool:
        """Whether a ``clear`` has not been carried out yet: hits would be stale."""
        return self._clearing > 0

    def stop(self) -> None:
        """End the thread; the shard notices the engine's end by itself."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=2 * RPC_SECONDS)
        if self.attachment is not None:
            self.attachment.reader.close()
            self.attachment = None

    # -- the link's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        pause = RETRY_SECONDS[0]
        while not self._stopping.is_set():
            try:
                self._attach()
                pause, heartbeat = RETRY_SECONDS[0], 0.0
                while not self._stopping.is_set():
                    self._send_stages()
                    self._send_clear()
                    if self._has_news() or time.monotonic() >= heartbeat:
                        self._exchange()
                        heartbeat = time.monotonic() + HEARTBEAT_SECONDS
                    self._wake.wait(self._period)
                    self._wake.clear()
            except Exception as error:
                self._client = None
                if self._stopping.is_set():
                    return
                self._complain(error)
                self._wake.wait(pause)
                pause = min(2 * pause, RETRY_SECONDS[1])

    def _complain(self, error: Exception) -> None:
        """Log why there is no shard, once for each reason: attempts go on for ever."""
        if str(error) != self._complaint:
            self._complaint = str(error)
            level = logging.ERROR if isinstance(error, LmkvError) else logging.WARNING
            logger.log(level, "lmkv_ray: serving without cache until a shard answers: %s", error)

    def _attach(self) -> None:
        client = self._connect()
        with self._lock:
            held = [*self._free, *self._in_use]
        hello = Hello(
            engine_id=self._hello.engine_id,
            owner=self._hello.owner,
            space=self._hello.space,
            model=self._hello.model,
            slot_bytes=self._hello.slot_bytes,
            held=held,
        )
        welcome = decode(_call(client, "hello", encode(hello)), Welcome)
        attached = self.attachment
        same = attached is not None and attached.arena_id == welcome.arena_id
        if attached is not None and same:
            reader = attached.reader  # the path may be a new one: of the restarted shard
        else:
            reader = ArenaReader.attach(welcome.arena_path, welcome.arena_id)
        attached = Attachment(welcome.arena_path, welcome.arena_id, reader)
        with self._lock:  # arena and slots change together
            self.attachment = attached
            granted = dict.fromkeys(welcome.grant.slots, welcome.grant.deadline)
            # Slots of another arena, or that the shard does not recognise, are gone.
            self._in_use = {s: granted.pop(s) for s in self._in_use if same and s in granted}
            self._free = granted
            if not same:
                self._outbox = _Outbox(touched=self._outbox.touched)
                self._committing.clear()
        self.peers = welcome.peers
        if self._device is not None:
            self._device.start_over()
        self._client, self._complaint = client, ""
        logger.info("lmkv_ray: attached to the shard of node %s", welcome.node_id)

    def _has_news(self) -> bool:
        """Whether an exchange is due; recency waits for the heartbeat, it is only a hint."""
        return bool(self._outbox.commits or self._outbox.released or self._wanted())

    def _wanted(self) -> int:
        """Free slots to ask for: none while half of them are there."""
        wanted = self._want_slots - len(self._free)
        return wanted if wanted > self._want_slots // 2 else 0

    def _exchange(self) -> None:
        assert self._client is not None
        with self._lock:
            outbox, self._outbox = self._outbox, _Outbox()
            want = self._wanted()
        added, removed = self._device.news() if self._device is not None else (b"", b"")
        message = Exchange(
            engine_id=self._hello.engine_id,
            commits=outbox.commits,
            released=outbox.released,
            touched=b"".join(outbox.touched),
            want=want,
            device_added=added,
            device_removed=removed,
        )
        # If this fails, nothing is sent again: slots that the next Hello does not list as held are
        # the shard's, whether or not it saw these commits.
        try:
            reply = decode(_call(self._client, "exchange", encode(message)), ExchangeReply)
        finally:
            with self._lock:
                self._committing.difference_update(c.key for c in outbox.commits)
        self.peers = reply.peers
        if not reply.known:
            raise ConnectionError("the shard does not know this engine (any more)")
        if reply.refused:  # the grant was overtaken by a clear, or by its deadline
            self._return_free_slots()
        if reply.grant is not None:
            with self._lock:
                self._free |= dict.fromkeys(reply.grant.slots, reply.grant.deadline)

    def _return_free_slots(self) -> None:
        with self._lock:
            self._outbox.released.extend(self._free)
            self._free.clear()

    def _send_stages(self) -> None:
        assert self._client is not None
        while self._stages:
            request, ticket = self._stages.popleft()
            future = self._client.call("stage", encode(request))
            future.add_done_callback(lambda f, t=ticket: self._staged(f, t))  # type: ignore[misc]

    def _staged(self, future: Future[bytes], ticket: StageTicket) -> None:
        try:
            ticket.reply = decode(future.result(), StageReply)
        except Exception as error:
            logger.debug("lmkv_ray: staging failed: %s", error)
        ticket.over = True
        with self._lock:
            self._staging -= 1

    def _send_clear(self) -> None:
        assert self._client is not None
        if pending := self._clearing:
            _call(self._client, "clear", self._hello.space.to_bytes(KEY_BYTES // 2, "little"))
            self._return_free_slots()
            with self._lock:
                self._clearing -= pending


def _call(client: ShardClient, method: str, payload: bytes) -> bytes:
    return client.call(method, payload).result(timeout=RPC_SECONDS)
