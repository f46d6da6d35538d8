"""An object that lives in a process of a host; its methods are called through a socket."""

from __future__ import annotations

import importlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from tests import calls

END_SECONDS = 20.0


class Remote(calls.Caller):
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
        super().__init__(Connection(ours.detach()))
        self._pipe.send((kind, args, kwargs))

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
    """In the process: make the object that the other end asks for, and serve it."""
    pipe = Connection(fd)
    kind, args, kwargs = pipe.recv()
    module, _, name = kind.partition(":")
    calls.serve(pipe, lambda: getattr(importlib.import_module(module), name)(*args, **kwargs))
