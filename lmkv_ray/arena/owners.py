"""Processes that may write into reserved slots, and whether they still live.

Only a certain answer counts as an end. Slots of a process that has ended are given to others, so an
error of another kind (no file descriptor or no memory is left to look) means that it may live.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lmkv_ray.errors import ArenaError
from lmkv_ray.messages import Owner

_EXITING = 0x4
"""PF_EXITING of ``/proc/<pid>/stat``: the kernel takes the process apart."""
_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, slots=True)
class _Life:
    state: str
    flags: int
    threads: int
    start: int
    """Clock ticks since boot."""

    @property
    def ended(self) -> bool:
        """The process has no memory any more.

        A zombie that still has other threads may write: the kernel has not given all of them back.
        """
        return self.state in "ZX" and self.threads <= 1

    @property
    def ending(self) -> bool:
        """The process was killed or has returned, and nothing can stop its end."""
        return self.state in "ZX" or bool(self.flags & _EXITING)


def this_process() -> Owner:
    """The calling process.

    Raises:
        ArenaError: it cannot be looked up.
    """
    return process(os.getpid())


def process(pid: int) -> Owner:
    """A process, by its number; the caller knows that it has not been collected yet.

    Raises:
        ArenaError: it cannot be looked up.
    """
    try:
        return Owner(pid=pid, start=_look(pid).start)
    except OSError as error:
        raise ArenaError(
            f"The process {pid} cannot be looked up in /proc: {error.strerror}.",
            next_step="mount /proc, and allow more open files (ulimit -n).",
        ) from error


def is_alive(owner: Owner) -> bool:
    """Whether the process may still write; True as well if that cannot be known now."""
    try:
        life = _look(owner.pid)
    except _GONE:
        return False
    except OSError:
        return True
    return life.start == owner.start and not life.ended


def is_ending(owner: Owner) -> bool:
    """Whether the process has ended, or is certain to; it may take long to unmap its memory."""
    try:
        life = _look(owner.pid)
    except _GONE:
        return True
    except OSError:
        return False
    return life.start != owner.start or life.ending


def _look(pid: int) -> _Life:
    """What the kernel says of a process.

    Raises:
        OSError: it says nothing; ``_GONE``: there is no such process.
    """
    text = Path(f"/proc/{pid}/stat").read_text()
    # The second field is the program's name in parentheses, which may contain anything.
    values = text.rpartition(")")[2].split()
    return _Life(values[0], int(values[6]), int(values[17]), int(values[19]))
