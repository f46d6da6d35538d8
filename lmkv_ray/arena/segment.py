"""Shared memory without a name.

The file is created in a tmpfs directory and unlinked at once. Others open it through
``/proc/<pid>/fd/<n>`` of a process that holds it, so the kernel frees it with its last user, and
nothing is left in /dev/shm, whatever is killed in whatever order. A process that holds it can be
found by the name in the link of its file descriptor: ``/dev/shm/lmkv-<name>-<random> (deleted)``.

Pages are allocated explicitly (``allocate``), never by touching them: touching a page that tmpfs
cannot give any more kills a process with SIGBUS, while ``posix_fallocate`` answers ENOSPC (and
takes only 60 ms for 256 MiB, as it does not zero the pages).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena.ownership import check_ours, is_ours
from lmkv_ray.arena.shortage import check_shortage
from lmkv_ray.errors import ArenaError

DEFAULT_DIRECTORY = Path("/dev/shm")
_NAME = re.compile(r"[A-Za-z0-9_.]{1,100}")
_RANDOM = r"[0-9a-f]{16}"


class Segment:
    """An open file of shared memory. Made by ``create`` or ``open``; closed at its end at last."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes

    @classmethod
    def create(cls, directory: Path, name: str, nbytes: int) -> Segment:
        """A new sparse file of zeros, mode 0600, that has no name any more.

        Raises:
            ArenaError: the directory is missing or not writable, has less than ``nbytes`` free, or
                others can open what is made there.
        """
        if not _NAME.fullmatch(name):
            raise ArenaError(
                f"{name!r} cannot name shared memory.",
                next_step="use letters, digits, dots and underscores, at most 100.",
            )
        if not directory.is_dir():
            raise ArenaError(
                f"The arena directory {directory} does not exist.",
                next_step="set LMKV_ARENA_DIR to a directory on a tmpfs, normally /dev/shm.",
            )
        free = shutil.disk_usage(directory).free
        if free < nbytes:
            raise _no_space(directory, nbytes, free)
        path = directory / f"lmkv-{name}-{secrets.token_hex(8)}"
        try:
            _sweep(directory)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ArenaError(
                f"No file can be created in the arena directory {directory}: {error.strerror}.",
                next_step="make it writable for this user, or set LMKV_ARENA_DIR to one that is.",
            ) from error
        # A process killed between these two lines leaves an empty file, for the next sweep.
        path.unlink(missing_ok=True)
        segment = cls(fd, nbytes)
        try:
            check_ours(fd, str(path))  # it may have got another name meanwhile
            os.ftruncate(fd, nbytes)
        except OSError as error:
            segment.close()
            raise ArenaError(
                f"A file in {directory} cannot have {nbytes} bytes: {error.strerror}.",
                next_step="set LMKV_ARENA_DIR to a directory on a tmpfs, normally /dev/shm.",
            ) from error
        except ArenaError:
            segment.close()
            raise
        return segment

    @classmethod
    def open(cls, path: str) -> Segment:
        """The segment another process (or this one) holds, by its ``path``.

        Raises:
            ArenaError: no process holds it any more, this process may not see it, it is something
                else, or it is not this user's alone.
            ShortageError: it may be there.
        """
        try:
            # What is no file must not make us wait, or become our terminal, before it is judged.
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            check_shortage(error)
            raise ArenaError(
                f"The arena {path} cannot be opened: {error.strerror}.",
                next_step="run the shard and the engine as one user in one container (one pid "
                "namespace); if they are, the shard has just died and Ray restarts it.",
            ) from error
        try:
            return cls(fd, check_ours(fd, path).st_size)
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def find(
        name: str, directory: Path = DEFAULT_DIRECTORY, *, below: bool = False
    ) -> Iterator[str]:
        """Paths of the segments of this name that any process of this user still holds, each once.

        They were all created in ``directory``. Processes that end meanwhile are skipped.

        Args:
            name: as given to ``create``.
            directory: as given to ``create``.
            below: find those whose name goes on after a dot, instead: ``name.x``.

        Raises:
            ShortageError: there may be more.
        """
        start = re.escape(f"{directory.resolve()}/lmkv-{name}")
        rest = rf"\.{_NAME.pattern}" if below else ""
        link = re.compile(rf"{start}{rest}-{_RANDOM} \(deleted\)")
        seen = set()
        for process in _entries(Path("/proc")):
            for descriptor in _descriptors(process) if process.name.isdigit() else ():
                target = _target(descriptor)
                if link.fullmatch(target) and target not in seen:
                    seen.add(target)
                    yield str(descriptor)

    @property
    def path(self) -> str:
        """Opens this segment in any process of this user and pid namespace, while we hold it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def allocate(self, offset: int, nbytes: int) -> None:
        """Make sure that the pages of a range exist; all or nothing. Releases the GIL.

        Raises:
            ArenaError: there is no memory left, or the file system gives none.
        """
        while True:
            try:
                return os.posix_fallocate(self.fd, offset, nbytes)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
                    raise ArenaError(
                        f"The file system of the arena gives no memory: {error.strerror}.",
                        next_step="set LMKV_ARENA_DIR to a directory on a tmpfs, normally "
                        "/dev/shm.",
                    ) from error
                status = os.fstatvfs(self.fd)
                raise _no_space(None, nbytes, status.f_bavail * status.f_frsize) from error

    def map(self, *, writable: bool, offset: int = 0, nbytes: int = 0) -> npt.NDArray[np.uint8]:
        """uint8 view of a range (default: to the end). The mapping lives as long as any view."""
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapping = mmap.mmap(
            self.fd, nbytes or self.nbytes - offset, mmap.MAP_SHARED, access, offset=offset
        )
        # The array keeps the mapping; it is never closed by hand, so there is no BufferError.
        return np.frombuffer(mapping, np.uint8)

    def close(self) -> None:
        """Give up the file descriptor. Views stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


def populate(view: npt.NDArray[np.uint8], *, writable: bool) -> None:
    """Fault in the allocated pages of a mapping, so that no copy has to. Releases the GIL.

    Best effort: kernels before 5.14 do not know how, and then the first copy pays.
    """
    populate_read, populate_write = 22, 23
    # Through ctypes, as mmap.madvise would keep the GIL for a quarter of a second per GiB.
    _LIBC.madvise(view.ctypes.data, view.nbytes, populate_write if writable else populate_read)


def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


_LIBC = _libc()


def _descriptors(process: Path) -> list[Path]:
    """Links of the open files of one of this user's processes; none if it has ended."""
    return _entries(process / "fd") if is_ours(process) else []


def _entries(directory: Path) -> list[Path]:
    """What is in a directory of /proc; nothing if its process has ended."""
    try:
        return list(directory.iterdir())
    except OSError as error:
        check_shortage(error)
        return []


def _target(descriptor: Path) -> str:
    """What an open file is called; nothing if it was closed meanwhile."""
    try:
        return str(descriptor.readlink())
    except OSError as error:
        check_shortage(error)
        return ""


def _sweep(directory: Path) -> None:
    """Remove names that a process killed within ``create`` left ."""
    for left in directory.glob("lmkv-*"):
        if re.fullmatch(rf"lmkv-{_NAME.pattern}-{_RANDOM}", left.name):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                left.unlink()


def _no_space(directory: Path | None, wanted: int, free: int) -> ArenaError:
    where = directory or "the file system of the arena"
    return ArenaError(
        f"{wanted / 2**20:.0f} MiB are wanted in {where}, but {free / 2**20:.0f} MiB are free.",
        next_step="lower LMKV_CAPACITY, or enlarge /dev/shm (docker run --shm-size, or an emptyDir "
        "with medium Memory on Kubernetes).",
    )
