"""A process that owns a NIXL agent, as its parent sees it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import os
from typing import cast

from lmkv_ray.arena import ArenaWriter, process, this_process
from lmkv_ray.child import start_child
from lmkv_ray.clock import Clock
from lmkv_ray.errors import ArenaError
from lmkv_ray.framing import Incoming, framed
from lmkv_ray.transports.nixl.wire import (
    AT_ONCE,
    PACKAGES,
    Command,
    HelperAnswer,
    HelperRequest,
    NotDone,
    Ready,
    Result,
    Serve,
)
from lmkv_ray.waits import all_ended, to_the_end

START_SECONDS = 20.0
"""A process that is not ready by then never will be: UCX may spin for ever when it starts, for
instance where the loopback interface is down."""
GRACE_SECONDS = 1.0
"""What a command may take beyond its deadline before the process is ended for it."""
RETRY_SECONDS = 60.0
"""A process that could not start is not tried again for so long."""
PROGRAM = "lmkv_ray.transports.nixl.process"


class HelperError(Exception):
    """The process could not do it; nothing of it writes into the slots any more.

    Args:
        why: for logs.
        late: there was no time for it.
        peer: it is the peer's fault, or that of the network to it.
    """

    def __init__(self, why: str, *, late: bool = False, peer: bool = False) -> None:
        super().__init__(why)
        self.late = late
        self.peer = peer


class Helper:
    """Starts its process when it is needed, and again when it has died. For one event loop.

    Args:
        arena: what the process serves from or reads into.
        clock: measures deadlines.
    """

    def __init__(self, arena: ArenaWriter, clock: Clock) -> None:
        self._arena = arena
        self._clock = clock
        self._life: _Life | None = None
        self._closed = False
        self._refused = -math.inf, ""
        """When and why the system let us start none."""
        self._turns = asyncio.Semaphore(AT_ONCE)

    @property
    def problem(self) -> str | None:
        """Why there can be no process, as far as is known without trying."""
        if self._closed:
            return "the shard ends"
        if not any(importlib.util.find_spec(package) for package in PACKAGES):
            return "the package nixl is not installed"
        at, why = self._refused
        if self._life is not None and self._life.failure is not None:
            at, why = max((at, why), (self._life.ended_at, self._life.failure))
        return why if self._clock.monotonic() < at + RETRY_SECONDS else None

    @property
    def agent(self) -> Ready | None:
        """The agent of the process, None while there is none; another one after a restart."""
        life = self._life
        return life.agent if life is not None else None

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        life = self._life
        return life.pid if life is not None and not life.has_ended else None

    def start(self) -> None:
        """Have a process, if there can be one, before it is needed. Does not wait for it."""
        with contextlib.suppress(HelperError):
            self._living()

    async def call(self, command: Command, deadline: float) -> Result:
        """Have a command carried out, at most a little longer than to the deadline.

        When this has returned or raised, also when it was cancelled, nothing writes into the slots
        of the command any more: a command that does not end is ended with the process, and
        all others with it.

        Args:
            command: what.
            deadline: monotonic seconds of the clock.

        Raises:
            HelperError: it was not, or not in time.
        """
        work = asyncio.ensure_future(self._call(command, deadline))
        await all_ended([work])
        return work.result()

    async def _call(self, command: Command, deadline: float) -> Result:
        late = HelperError("the deadline had passed", late=True)
        left = deadline - self._clock.monotonic()
        if left <= 0:
            raise late
        try:
            async with asyncio.timeout(left):
                await self._turns.acquire()
        except TimeoutError:
            raise late from None
        try:
            life = self._living()
            if not life.ready.done():
                await asyncio.wait([life.ready], timeout=deadline - self._clock.monotonic())
            if not life.ready.done():
                raise HelperError("the NIXL process is still starting", late=True)
            if life.failure is not None:
                raise HelperError(life.failure)
            answer = life.send(command)
            patience = max(deadline - self._clock.monotonic(), 0) + GRACE_SECONDS
            await asyncio.wait([answer], timeout=patience)
            if not answer.done():
                await life.end()
                raise HelperError("the transfer hung; its process was ended", peer=True)
        finally:
            self._turns.release()
        result = answer.result()
        if result is None:
            raise HelperError("the NIXL process has ended")
        if isinstance(result, NotDone):
            raise HelperError(result.why, peer=True)
        return result

    def serve(self) -> None:
        """Have the process attend to a peer that is about to read. Does not wait."""
        life = self._life
        if life is not None and life.agent is not None:
            life.tell(Serve())

    async def close(self) -> None:
        """End the process."""
        self._closed = True
        if self._life is not None:
            await self._life.end()

    def _living(self) -> _Life:
        if self._life is None or self._life.has_ended:
            problem = self.problem
            if problem is not None:
                raise HelperError(problem)
            try:
                self._life = _Life(self._arena, self._clock)
            except (OSError, ArenaError) as error:  # too many processes or files
                self._refused = (
                    self._clock.monotonic(),
                    f"the NIXL process cannot be started: {error}",
                )
                raise HelperError(self._refused[1]) from None
        return self._life


class _Life(asyncio.Protocol):
    """One process, from its start to its end, and the link to it."""

    def __init__(self, arena: ArenaWriter, clock: Clock) -> None:
        self._clock = clock
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done when it is known whether it could start."""
        self.agent: Ready | None = None
        """Its agent, once it is ready and while it lives."""
        self.failure: str | None = None
        """Why it could not start, or ended before it did anything."""
        self.ended_at = math.inf
        self._works = False
        self._number = 0
        self._open: dict[int, asyncio.Future[Result | None]] = {}
        self._answers = Incoming(HelperAnswer)
        self._link: asyncio.WriteTransport | None = None
        self._ending: asyncio.Task[None] | None = None
        arguments = [arena.path, str(arena.arena_id), str(os.getpid())]
        self._process, ours = start_child(PROGRAM, arguments)
        try:
            # A successor of this shard must wait for it before it uses the slots it may write into.
            arena.crews.join(this_process(), [process(self._process.pid)])
        except BaseException:
            ours.close()
            self._process.kill()
            raise
        ours.setblocking(False)
        self._linking = asyncio.ensure_future(loop.create_unix_connection(lambda: self, sock=ours))
        self._hurry = loop.call_later(START_SECONDS, self._process.kill)

    @property
    def has_ended(self) -> bool:
        """It is gone, and writes nowhere any more."""
        return self.ended_at < math.inf

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, command: Command) -> asyncio.Future[Result | None]:
        """Send a command; its result comes later, None if the process ends first."""
        answer: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()
        if self.agent is None:
            answer.set_result(None)
        else:
            self._number += 1
            self._open[self._number] = answer
            self._write(HelperRequest(number=self._number, command=command))
        return answer

    def tell(self, command: Serve) -> None:
        """Send a command that has no answer."""
        self._write(HelperRequest(number=-1, command=command))

    async def end(self) -> None:
        """Kill the process; when this returns it writes nowhere any more."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        await all_ended([self._ending])

    async def _end(self) -> None:
        self._process.kill()
        # No limit: until it is gone, all that it may still write to must stay reserved.
        await to_the_end(self._process.wait)
        self._hurry.cancel()
        if not self._works and self.failure is None:
            did = "start" if self.agent is None else "carry out its first command"
            self.failure = f"the NIXL process did not {did}"
        self.agent = None
        self.ended_at = self._clock.monotonic()
        self._settle()
        left, self._open = list(self._open.values()), {}
        for answer in left:
            answer.set_result(None)
        await self._linking
        if self._link is not None:
            self._link.abort()

    def _settle(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)

    def _write(self, request: HelperRequest) -> None:
        # A process that does not read is ended for the command it does not answer.
        if self._link is not None:
            self._link.write(framed(request))

    def connection_made(self, link: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        self._link = cast(asyncio.WriteTransport, link)  # uvloop's is of another family

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        for answer in self._answers.feed(data):
            self._take(answer)

    def connection_lost(self, error: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())

    def _take(self, answer: HelperAnswer) -> None:
        match answer.result:
            case Ready() as ready:
                self.agent = ready
                self._hurry.cancel()
                self._settle()
            case NotDone(why=why) if self.agent is None:
                self.failure = why
                self._settle()
            case result:
                waiting = self._open.pop(answer.number, None)
                self._works = True
                if waiting is not None:
                    waiting.set_result(result)
