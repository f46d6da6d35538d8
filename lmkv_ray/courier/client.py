"""The engine's side of its courier. Nothing here imports Ray."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import Future

from lmkv_ray import errors
from lmkv_ray.child import start_child
from lmkv_ray.config import Settings
from lmkv_ray.courier.wire import (
    Answer,
    Begin,
    Call,
    Command,
    Failed,
    Find,
    FoundShard,
    Reply,
    Request,
)
from lmkv_ray.errors import ConnectError, LmkvError
from lmkv_ray.framing import Incoming, send

logger = logging.getLogger(__name__)

PROGRAM = "lmkv_ray.courier.process"
START_SECONDS = 15.0
"""What a courier may take beyond ``connect_seconds``: it has to import Ray and to join."""
FIND_SECONDS = 20.0
"""What it may take once it has joined."""
SAY_SECONDS = 5.0
"""After this, the log says what is waited for."""
SEND_SECONDS = 5.0
"""A courier that has not taken a message by then is hanging."""
END_SECONDS = 10.0
"""In which a courier leaves the cluster when the engine ends."""
RECEIVED_BYTES = 1 << 18


class Courier:
    """Starts its process when a shard is asked for and it is not running. For any thread.

    Args:
        settings: the engine's own settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._finding = threading.Lock()
        self._life: _Life | None = None
        self._closed = False
        self._cluster = ""

    def shard(self, *, start: bool, host: str | None = None) -> CourierShard:
        """Find a shard; blocks, and ends within the time that the settings give.

        One search follows the other, so that a courier is given up for its own slowness, never for
        what stands in line before it.

        Args:
            start: start the cache if there is none. In another Ray cluster than the one before it
                is started anyway.
            host: ``host_id`` of another node; None: this one.

        Raises:
            LmkvError: there is no cluster, no cache or no shard.
            ConnectionError: the courier ended.
            OSError: it could not be started.
        """
        with self._finding:
            return self._find(start, host)

    def _find(self, start: bool, host: str | None) -> CourierShard:
        life = self._living()
        # A new one has to join, and may have to start the cache.
        within = FIND_SECONDS if life.found else self._settings.connect_seconds + START_SECONDS
        answer = life.ask(Find(start=start, known=self._cluster, host=host))
        deadline = time.monotonic() + within
        try:
            result = answer.result(min(within, SAY_SECONDS))
        except TimeoutError:
            where = self._settings.ray_address or "RAY_ADDRESS or this machine"
            logger.info(
                "lmkv_ray: waiting for the Ray cluster at %s and the shard of %s, for at most "
                "%.0f s; the engine serves meanwhile",
                where,
                "this node" if host is None else f"host {host}",
                within,
            )
            try:
                result = answer.result(max(deadline - time.monotonic(), 0))
            except TimeoutError:
                life.end()
                raise ConnectError(
                    f"Ray at {where} did not answer within {within:.0f} s.",
                    next_step="look at 'ray status'; the engine goes on trying.",
                ) from None
        if not isinstance(result, FoundShard):
            raise _error(result)
        life.found, self._cluster = True, result.cluster
        return CourierShard(life, result.shard)

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        life = self._life
        return life.process.pid if life is not None and not life.ended else None

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._closed = True
            life, self._life = self._life, None
        if life is not None:
            life.end(within=END_SECONDS)

    def _living(self) -> _Life:
        with self._lock:
            if self._closed:
                raise ConnectionError("the engine ends")
            if self._life is not None and self._life.ended:
                self._life.end()
                self._life = None
            if self._life is None:
                self._life = _Life(self._settings)
            return self._life


class CourierShard:
    """A shard that a courier has found: a ``ShardClient``."""

    def __init__(self, life: _Life, number: int) -> None:
        self._life = life
        self._number = number

    def call(self, method: str, payload: bytes) -> Future[bytes]:
        """Call a method of the shard; the future ends with its answer, or with the error."""
        replied: Future[bytes] = Future()

        def settle(answer: Future[Reply | FoundShard | Failed]) -> None:
            if (error := answer.exception()) is not None:
                replied.set_exception(error)
            elif isinstance(result := answer.result(), Reply):
                replied.set_result(result.payload)
            else:
                replied.set_exception(_error(result))

        command = Call(shard=self._number, method=method, payload=payload)
        self._life.ask(command).add_done_callback(settle)
        return replied


class _Life:
    """One process, from its start to its end."""

    def __init__(self, settings: Settings) -> None:
        self.ended = False
        self.found = False
        """Whether it has found a shard."""
        self._lock = threading.Lock()
        self._number = 0
        self._open: dict[int, Future[Reply | FoundShard | Failed]] = {}
        self.process: subprocess.Popen[bytes]
        self.process, self._link = start_child(PROGRAM, [str(os.getpid())])
        limit = struct.pack("@ll", int(SEND_SECONDS), 0)
        self._link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            threading.Thread(target=self._listen, name="lmkv-courier", daemon=True).start()
        except RuntimeError:  # no more threads
            self.end()
            raise
        self._send(Request(number=0, command=Begin(settings=pickle.dumps(settings))))

    def ask(self, command: Command) -> Future[Reply | FoundShard | Failed]:
        """Send a command; never raises: the future says what went wrong."""
        answer: Future[Reply | FoundShard | Failed] = Future()
        with self._lock:
            if self.ended:
                answer.set_exception(_gone())
                return answer
            self._number += 1
            number = self._number
            self._open[number] = answer
        self._send(Request(number=number, command=command))
        return answer

    def end(self, within: float = 0.0) -> None:
        """End the process, at once or when it had time to leave the cluster."""
        # The courier leaves when it hears nothing more; what hangs is killed.
        try:
            self._link.shutdown(socket.SHUT_WR)
            self.process.wait(within)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self._over()

    def _send(self, request: Request) -> None:
        with self._lock:
            try:
                send(self._link, request)
                return
            except OSError:
                pass
        # Part of a message may have gone: what follows could not be understood.
        self.process.kill()
        self._over()

    def _listen(self) -> None:
        answers = Incoming(Answer)
        try:
            while data := self._receive():
                for answer in answers.feed(data):
                    waiting = self._open.pop(answer.number, None)
                    if waiting is not None:
                        waiting.set_result(answer.result)
        except ValueError as error:
            logger.warning("lmkv_ray: the process that talks to Ray is not understood: %s", error)
        # It has ended, or cannot be heard any more: another one is started.
        self.process.kill()
        self._over()
        self.process.wait()
        self._link.close()

    def _receive(self) -> bytes:
        try:
            return self._link.recv(RECEIVED_BYTES)
        except OSError:
            return b""

    def _over(self) -> None:
        with self._lock:
            self.ended = True
            left, self._open = list(self._open.values()), {}
        for answer in left:
            answer.set_exception(_gone())


def _gone() -> ConnectionError:
    return ConnectionError("the process that talks to Ray has ended")


def _error(result: Reply | FoundShard | Failed) -> Exception:
    assert isinstance(result, Failed), result
    kind = getattr(errors, result.kind, None) if result.kind else None
    if isinstance(kind, type) and issubclass(kind, LmkvError):
        return kind(result.what, next_step=result.next_step)
    return ConnectionError(result.what)
