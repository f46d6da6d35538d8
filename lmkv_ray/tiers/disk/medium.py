"""What a disk tier needs of a machine's disk: the seam to the operating system.

``LocalMedium`` (``local.py``) is the real one. The simulation has one that is slow, full, torn or
read-only when it is told so, and that loses in a crash what was never synced
(``tests/simulation/disk.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What a listing says of a file."""

    name: str
    size: int
    """Bytes of its content."""
    blocks: int
    """Bytes it takes on the medium."""
    modified: float
    """Seconds since 1970."""
    ours: bool
    """Only this user can have written it: see ``ownership``."""


class OpenFile(Protocol):
    """An open file. Every method blocks, and raises ``OSError``."""

    def size(self) -> int:
        """Bytes of its content."""
        ...

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill buffers from an offset on; how many bytes came."""
        ...

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write buffers to an offset; how many bytes were taken."""
        ...

    def allocate(self, nbytes: int) -> None:
        """Take room for so many bytes."""
        ...

    def modified(self) -> float:
        """Seconds since 1970."""
        ...

    def touch(self, now: float) -> None:
        """Set ``modified``."""
        ...

    def close(self) -> None:
        """Let go of it; of what was moved without O_DIRECT the kernel keeps no copy."""
        ...


class Tree(Protocol):
    """A directory that is open and locked for us alone, and what is below it.

    Paths are relative to the directory that was opened: if it is removed or something is mounted
    over it, nothing that is in its place now is touched. Every method blocks, and raises
    ``OSError``.
    """

    def names(self) -> set[str]:
        """What is directly in it."""
        ...

    def make(self, folder: str) -> None:
        """Make a subdirectory, if it is missing."""
        ...

    def foreign(self, folder: str | None) -> tuple[str, str] | None:
        """Why a subdirectory (None: the directory itself) is not ours alone, and the remedy."""
        ...

    def files(self, folder: str) -> list[FileStatus]:
        """What is in a subdirectory, and is no directory itself."""
        ...

    def open(self, path: str, *, direct: bool) -> OpenFile:
        """Open a file to read it; ``direct``: with O_DIRECT."""
        ...

    def create(self, path: str, *, direct: bool) -> OpenFile:
        """Make a file that is not there yet, for this user only, to be written and read."""
        ...

    def rename(self, path: str, to: str) -> None:
        """In one atomic step; what was there before is gone."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        ...

    def sync(self, path: str) -> None:
        """Let a file and its name survive a crash of the machine from now on."""
        ...

    def replaced(self) -> bool:
        """Whether the path that was opened names another directory by now."""
        ...

    def free(self) -> int:
        """Bytes that the file system has left for us."""
        ...

    def close(self) -> None:
        """Let go of it; others may use it from now on."""
        ...


class Job(Protocol):
    """What one thread is to do."""

    def begin(self) -> bool:
        """A thread is free now; False: it is not wanted any more. Called in any thread."""
        ...

    def work(self) -> None:
        """Do it. Called in any thread, after ``begin``; raises nothing."""
        ...

    def end(self) -> None:
        """No thread will touch any more what it works on. Called on the event loop."""
        ...


class Threads(Protocol):
    """A few threads, for one event loop."""

    def start(self, job: Job) -> None:
        """Do it as soon as a thread is free."""
        ...

    def close(self) -> None:
        """Begin nothing more, and end the threads as soon as they are free."""
        ...


class Medium(Protocol):
    """A machine's disks."""

    def open(self, path: Path) -> Tree:
        """Open a directory and lock it, making it if need be. Blocks.

        Raises:
            BlockingIOError: another process has locked it.
            OSError: what the medium says.
        """
        ...

    def threads(self, name: str, count: int) -> Threads:
        """Threads for what blocks."""
        ...
