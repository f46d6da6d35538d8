"""The engine's line to the shard of one of its nodes: a thread that does all the talking.

The engine's thread only ever appends to queues (``Slots``; requests to stage) and reads
what has arrived; it never waits for the link. Everything is bounded: what does not fit is dropped
and counted by the caller. The link survives its shard: on any error it says ``Hello`` again, with
growing pauses, for as long as the engine lives.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from lmkv_ray.arena import ArenaReader
from lmkv_ray.errors import ChunkSizeError, LmkvError
from lmkv_ray.messages import (
    Hello,
    Stage,
    StageReply,
    decode,
    encode,
)
from lmkv_ray.vllm.link.conversation import Conversation
from lmkv_ray.vllm.link.device_watch import DeviceWatch
from lmkv_ray.vllm.link.slots import Slots
from lmkv_ray.vllm.link.ticket import StageTicket

logger = logging.getLogger(__name__)

RPC_SECONDS = 5.0
"""After this, an exchange with the shard counts as failed."""

RETRY_SECONDS = (0.1, 5.0)
"""First and longest pause before a new attempt to attach."""
MISFIT_SECONDS = 60.0
"""Between attempts while the chunks do not fit: the shard must be started with other settings."""
LEAST_SECONDS = 0.05
"""Between two exchanges that nothing urgent asks for: grants that have expired before they arrive
must not be exchanged without a pause."""

MAX_STAGES = 64
"""Stage requests under way."""

ANSWER_SECONDS = 0.5
"""How long the answer of another node's shard may take beyond the time for staging."""


class ShardClient(Protocol):
    """How to call a shard. Errors of any kind mean: not now, try again."""

    def call(self, method: str, payload: bytes) -> Future[bytes]:
        """Send; the future ends with the answer's bytes."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """The arena of the shard."""

    path: str
    arena_id: int
    reader: ArenaReader | None
    """None: it is on another node."""


class ShardLink:
    """See the module.

    Args:
        connect: finds or starts the shard; may block and raise; called on the link's thread.
        hello: who this engine is (``held`` is filled in by the link).
        want_slots: free slots to keep at hand.
        period: seconds between exchanges when nothing is urgent.
        maps: whether the shard is on this node, so that its arena can be mapped.
        device: what the shard is told of the engine's own cache, if anything.
    """

    def __init__(
        self,
        connect: Callable[[], ShardClient],
        hello: Hello,
        *,
        want_slots: int,
        period: float,
        maps: bool = True,
        device: DeviceWatch | None = None,
    ) -> None:
        self._connect = connect
        self._maps = maps
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._stages: deque[tuple[Stage, StageTicket]] = deque()
        self._staging = 0
        self._complaint = ""
        self._client: ShardClient | None = None
        self.slots = Slots(want_slots, self._wake.set)
        """What this engine may fill."""
        self._talk = Conversation(hello, self.slots, period, maps=maps, device=device)
        self.attachment: Attachment | None = None
        """The arena, once attached. It stays readable while the shard is away."""
        self.differs: list[str] = []
        """Fields of the namespace in which engines of this model's name differ from this one."""
        self._thread: threading.Thread | None = None
        self._start_at = 0.0
        self._start()

    # -- the engine's thread: nothing here waits -------------------------------------------------

    def stage(
        self,
        keys: bytes,
        within: float,
        remaining: Sequence[float] = (),
        *,
        space: int = 0,
        locate: bool = False,
    ) -> StageTicket | None:
        """Ask for chunks from elsewhere; None if too much is under way already.

        Args:
            keys: of a run of chunks.
            within: seconds.
            remaining: see ``Stage``.
            space: see ``Stage``.
            locate: the answer shall say where they are; for arenas of other nodes.
        """
        with self._lock:
            if self._client is None or self._staging >= MAX_STAGES:
                return None
            self._staging += 1
            answer = within + (ANSWER_SECONDS if locate else 0)
            ticket = StageTicket(time.monotonic() + answer)
            request = Stage(
                engine_id=self._talk.engine_id,
                keys=keys,
                slot_bytes=self._talk.slot_bytes,
                within=within,
                remaining=list(remaining),
                locate=locate,
                space=space,
            )
            self._stages.append((request, ticket))
        self._wake.set()
        return ticket

    def rename(self, space: int, fields: dict[str, str]) -> None:
        """From now on chunks are committed in another space, and none in the old one.

        Args:
            space: the new one.
            fields: of its namespace, for people.
        """
        self._talk.rename(space, fields)
        self._wake.set()

    @property
    def peers(self) -> int:
        """Other nodes and tiers that hold chunks."""
        return self._talk.peers

    @property
    def readable(self) -> ArenaReader | None:
        """The arena, if there is one and it is mapped."""
        if self._thread is None:
            self._start()
        arena = self.attachment
        return None if arena is None else arena.reader

    def end(self) -> None:
        """Let the thread end; ``stop`` waits for it."""
        self._stopping.set()
        self._wake.set()

    def stop(self) -> None:
        """End the thread; the shard notices the engine's end by itself."""
        self.end()
        if self._thread is not None:
            self._thread.join(timeout=2 * RPC_SECONDS)
        attached, self.attachment = self.attachment, None
        if attached is not None and attached.reader is not None:
            attached.reader.close()

    def _start(self) -> None:
        """Start the thread; if the system refuses it, again some time after."""
        if time.monotonic() < self._start_at:
            return
        thread = threading.Thread(target=self._run, name="lmkv-link", daemon=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            self._start_at = time.monotonic() + RETRY_SECONDS[1]
            self._complain(error)
        else:
            self._thread = thread

    # -- the link's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        pause = RETRY_SECONDS[0]
        while not self._stopping.is_set():
            try:
                self._attach()
                pause = RETRY_SECONDS[0]
                while not self._stopping.is_set():
                    if self._talk.hello_is_due:
                        self._attach()
                    self._send_stages()
                    if self._talk.exchange_is_due:
                        self._exchange()
                    self._wake.wait(max(self._talk.quiet_for, LEAST_SECONDS))
                    self._wake.clear()
            except Exception as error:
                self._client = None
                if self._stopping.is_set():
                    return
                self._complain(error)
                if isinstance(error, ChunkSizeError):
                    self._stopping.wait(MISFIT_SECONDS)
                else:
                    self._stopping.wait(pause)  # whatever the engine has to tell meanwhile
                    pause = min(2 * pause, RETRY_SECONDS[1])

    def _complain(self, error: Exception) -> None:
        """Log why there is no shard, once for each reason: attempts go on for ever."""
        # What the shard raised comes wrapped, with the traceback of another process as its text.
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, LmkvError) else error
        if str(error) != self._complaint:
            self._complaint = str(error)
            level = logging.ERROR if isinstance(error, LmkvError) else logging.WARNING
            logger.log(level, "lmkv_ray: serving without cache until a shard answers: %s", error)

    def _attach(self) -> None:
        client = self._connect()
        welcome = self._talk.welcomed(_call(client, "hello", self._talk.hello()))
        attached = self.attachment
        if not self._maps:
            reader = None
        elif attached is not None and attached.arena_id == welcome.arena_id:
            reader = attached.reader  # the path may be a new one: of the restarted shard
        else:
            reader = ArenaReader.attach(welcome.arena_path, welcome.arena_id)
        self._talk.attached(welcome)
        self.attachment = Attachment(welcome.arena_path, welcome.arena_id, reader)
        self._client, self._complaint = client, ""
        logger.info("lmkv_ray: attached to the shard of node %s", welcome.node_id)

    def _exchange(self) -> None:
        assert self._client is not None
        message, news = self._talk.exchange()
        try:
            answer = _call(self._client, "exchange", message)
        except BaseException:
            self._talk.failed(news)
            raise
        try:
            self._talk.answered(news, answer)
        finally:
            self._note_kin(self._talk.differs)

    def _note_kin(self, differs: list[str]) -> None:
        """Log, when it is news, why engines of this model's name share nothing with this one."""
        if differs != self.differs:
            self.differs = differs
            if differs:
                logger.warning(
                    "lmkv_ray: other engines of %s share no chunks with this one: they differ in "
                    "%s. 'lmkv status' shows the values.",
                    self._talk.model,
                    ", ".join(differs),
                )

    def _send_stages(self) -> None:
        assert self._client is not None
        while self._stages:
            request, ticket = self._stages[0]  # stays there if it cannot be sent
            if ticket.pending:
                answer = self._client.call("stage", encode(request))
                answer.add_done_callback(partial(self._staged, ticket))
            else:  # the shard was away for long
                self._end_stage(ticket)
            self._stages.popleft()

    def _staged(self, ticket: StageTicket, future: Future[bytes]) -> None:
        try:
            ticket.reply = decode(future.result(), StageReply)
        except Exception as error:
            logger.debug("lmkv_ray: staging failed: %s", error)
        self._end_stage(ticket)

    def _end_stage(self, ticket: StageTicket) -> None:
        ticket.over = True
        with self._lock:
            self._staging -= 1


def _call(client: ShardClient, method: str, payload: bytes) -> bytes:
    return client.call(method, payload).result(timeout=RPC_SECONDS)
