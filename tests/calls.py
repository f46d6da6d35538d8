"""Calls of the methods of an object in another process, through a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self


class Caller:
    """The end of the pipe that calls.

    Args:
        pipe: to a process that runs ``serve``.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.pid = 0
        """Its process, as it counts itself; 0 until the object is made (``wait_made``)."""

    def wait_made(self, timeout: float = 180) -> Self:
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


def serve(pipe: Connection, make: Callable[[], Any]) -> None:
    """Make the object and do what we are told, until the other end closes."""
    try:
        made = make()
    except Exception as error:
        pipe.send(error)
        return
    try:
        pipe.send(os.getpid())
        while True:
            method, args, kwargs = pipe.recv()
            try:
                pipe.send(getattr(made, method)(*args, **kwargs))
            except Exception as error:
                pipe.send(error)
    except (EOFError, ConnectionError):  # closed
        made.close()
