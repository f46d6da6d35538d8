"""A process of our own that talks with its parent over a socket."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path


def start_child(
    program: str, arguments: Sequence[str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start ``python -m program``; it finds the modules that this process finds, and no others.

    Args:
        program: a module.
        arguments: for it; the number of its socket's descriptor follows them.

    Returns:
        the process, and this side of the socket.

    Raises:
        OSError: there are too many processes or files.
    """
    ours, theirs = socket.socketpair()
    # -P: the working directory may be /tmp, where other users put modules.
    command = [sys.executable, "-P", "-m", program, *arguments, str(theirs.fileno())]
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


def watch(parent: int, link: socket.socket) -> None:
    """In the child: let nothing more be heard on the link once the parent has ended.

    The socket alone does not tell: a fork of the parent holds the other end as well.

    Args:
        parent: pid of the process that called ``start_child``.
        link: the child's side of the socket.
    """
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        link.shutdown(socket.SHUT_RD)
        return
    except OSError:  # a kernel before 5.3, or a sandbox: the socket has to do
        return

    def wait() -> None:
        if os.getppid() == parent:  # else another process has its number by now
            select.select([descriptor], [], [])
        link.shutdown(socket.SHUT_RD)

    threading.Thread(target=wait, name="parent", daemon=True).start()
