"""A process that owns a NIXL agent, as its parent sees it."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from lmkv_ray.arena import ArenaWriter
from lmkv_ray.transports.nixl.wire import (
    AT_ONCE,
    PACKAGES,
    Answer,
    Command,
    Failed,
    Ready,
    Request,
    Result,
    Serve,
    receive,
    send,
)

START_SECONDS = 20.0
"""A process that is not ready by then never will be."""
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
    """Starts its process when it is needed, and again when it has died. Thread-safe.

    Args:
        arena: what the process serves from or reads into.
    """

    def __init__(self, arena: ArenaWriter) -> None:
        self._arena = arena
        self._lock = threading.Lock()
        self._life: _Life | None = None
        self._closed = False
        self.executor = ThreadPoolExecutor(AT_ONCE, "nixl")
        """For calls of ``call``."""

    @property
    def problem(self) -> str | None:
        """Why there can be no process, as far as is known without trying."""
        if self._closed:
            return "the shard ends"
        if not any(importlib.util.find_spec(package) for package in PACKAGES):
            return "the package nixl is not installed"
        life = self._life
        if life is None or life.agent is not None or not life.ready.done():
            return None
        error = life.ready.exception()
        recent = time.monotonic() < life.ended_at + RETRY_SECONDS
        return str(error) if error is not None and recent else None

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

    def call(self, command: Command, deadline: float) -> Result:
        """Have a command carried out. Blocks, at most a little longer than to the deadline.

        When this has returned or raised, nothing writes into the slots of the command any more: a
        command that does not end is ended with the process, and everybody else's with it.

        Args:
            command: what.
            deadline: ``time.monotonic()`` seconds.

        Raises:
            HelperError: it was not, or not in time.
        """
        if time.monotonic() >= deadline:
            raise HelperError("the deadline had passed", late=True)
        life = self._living()
        try:
            life.ready.result(deadline - time.monotonic())
        except TimeoutError:
            raise HelperError("the NIXL process is still starting", late=True) from None
        answer = life.send(command)
        try:
            result = answer.result(max(deadline - time.monotonic(), 0) + GRACE_SECONDS)
        except TimeoutError:
            life.end()
            raise HelperError("the transfer hung; its process was ended", peer=True) from None
        if isinstance(result, Failed):
            raise HelperError(result.why, peer=True)
        return result

    def serve(self) -> None:
        """Have the process attend to a peer that is about to read. Does not wait."""
        life = self._life
        if life is not None and life.agent is not None:
            life.tell(Serve())

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._closed = True
            if self._life is not None:
                self._life.end()
        self.executor.shutdown()

    def _living(self) -> _Life:
        with self._lock:
            if self._life is None or self._life.has_ended:
                problem = self.problem
                if problem is not None:
                    raise HelperError(problem)
                self._life = _Life(self._arena)
            return self._life


class _Life:
    """One process, from its start to its end."""

    def __init__(self, arena: ArenaWriter) -> None:
        self.ready: Future[Result] = Future()
        self.ended_at = math.inf
        self._numbers = itertools.count(1)
        self._open: dict[int, Future[Result]] = {0: self.ready}
        self._lock = threading.Lock()
        self.has_ended = False
        self._link, theirs = socket.socketpair()
        command = [
            sys.executable, "-m", PROGRAM,
            arena.path, str(arena.arena_id), str(os.getpid()), str(theirs.fileno()),
        ]  # fmt: skip
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        threading.Thread(target=self._listen, name="nixl answers", daemon=True).start()

    @property
    def agent(self) -> Ready | None:
        """Its agent, once it is ready and while it lives."""
        if self.has_ended or not self.ready.done() or self.ready.exception() is not None:
            return None
        ready = self.ready.result()
        return ready if isinstance(ready, Ready) else None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, command: Command) -> Future[Result]:
        """Send a command; its result comes later, ``HelperError`` if the process ends first."""
        answer: Future[Result] = Future()
        with self._lock:
            number = next(self._numbers)
            if self.has_ended:
                answer.set_exception(HelperError("the NIXL process has ended"))
                return answer
            self._open[number] = answer
            # A process that does not read is ended for the command it does not answer; that also
            # ends this call.
            with contextlib.suppress(OSError):  # it has ended: ``_listen`` says so
                send(self._link, Request(number=number, command=command))
        return answer

    def tell(self, command: Serve) -> None:
        """Send a command that has no answer."""
        with self._lock, contextlib.suppress(OSError):
            send(self._link, Request(number=-1, command=command))

    def end(self) -> None:
        """Kill the process; when this returns it writes nowhere any more."""
        self._process.kill()
        # No limit: until it is gone, all that it may still write to must stay reserved.
        self._process.wait()
        self.ended_at = time.monotonic()
        self.has_ended = True

    def _listen(self) -> None:
        answers = msgspec.msgpack.Decoder(Answer)
        # UCX may spin for ever when it starts, for instance where the loopback interface is down.
        self._link.settimeout(START_SECONDS)
        while (answer := receive(self._link, answers)) is not None:
            self._link.settimeout(None)
            waiting = self._open.pop(answer.number, None)
            if waiting is None:
                continue
            if answer.number == 0 and isinstance(answer.result, Failed):
                waiting.set_exception(HelperError(answer.result.why))
            else:
                waiting.set_result(answer.result)
        self.end()
        with self._lock:  # after this nobody sends
            left, self._open = list(self._open.values()), {}
            self._link.close()
        for waiting in left:
            why = "did not start" if waiting is self.ready else "has ended"
            waiting.set_exception(HelperError(f"the NIXL process {why}"))
