"""An object that lives in a process of a host; its methods are called through a socket."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

END_SECONDS = 20.0


class Remote:
    """Calls the methods of an object elsewhere. Made by ``Host.remote``.

    Args:
        enter: makes a command line run elsewhere.
        environment: of the process.
        kind: "module:Class".
        args, kwargs: of the class.
    """

    def __init__(
        self,
        enter: Callable[[Sequence[str]], list[str]],
        environment: Mapping[str, str],
        kind: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        code = f"from tests.hosts.remote import serve; serve({fd})"
        self._process = subprocess.Popen(
            enter([sys.executable, "-c", code]),
            env=environment,
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._pipe.send((kind, args, kwargs))
        self.pid = 0
        """Its process, as its host counts; 0 until the object is made (``wait_made``)."""

    def wait_made(self, timeout: float = 180) -> Remote:
        """Until the object is there; its constructor's error is raised here."""
        self.pid = self.result(timeout)
        return self

    def start(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Begin a call."""
        if not self.pid:
            self.wait_made()
        self._pipe.send((method, args, kwargs))

    def result(self, timeout: float = 120) -> Any:
        """The answer of the call that was begun.

        Raises:
            TimeoutError, EOFError, ConnectionError: none came; the process died.
        """
        if not self._pipe.poll(timeout):
            raise TimeoutError
        value = self._pipe.recv()
        if isinstance(value, BaseException):
            raise value
        return value

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A whole call."""
        self.start(method, *args, **kwargs)
        return self.result()

    def wait_ended(self) -> None:
        """Until the process has ended."""
        self._process.wait(END_SECONDS)

    def close(self) -> None:
        """Close the object and end its process."""
        self._pipe.close()
        self._process.send_signal(signal.SIGCONT)  # nsenter stops with what it has started
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)  # its host ends what is behind it
            self._process.wait()


def serve(fd: int) -> None:
    """Make the object and do what we are told, until the other end closes."""
    pipe = Connection(fd)
    kind, args, kwargs = pipe.recv()
    module, _, name = kind.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)(*args, **kwargs)
        pipe.send(os.getpid())
    except Exception as error:
        pipe.send(error)
        return
    while True:
        try:
            method, args, kwargs = pipe.recv()
        except (EOFError, ConnectionError):
            break
        try:
            pipe.send(getattr(made, method)(*args, **kwargs))
        except Exception as error:
            pipe.send(error)
    made.close()
