"""A process of our own that talks with its parent over a socket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start_child(
    program: str, arguments: Sequence[str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start ``python -m program``; it finds the modules that this process finds.

    Args:
        program: a module.
        arguments: for it; the number of its socket's descriptor follows them.

    Returns:
        the process, and this side of the socket.

    Raises:
        OSError: there are too many processes or files.
    """
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", program, *arguments, str(theirs.fileno())]
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    with contextlib.ExitStack() as failing, theirs:
        failing.callback(ours.close)
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
        )
        failing.pop_all()
    return process, ours
