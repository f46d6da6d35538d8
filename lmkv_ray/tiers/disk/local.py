"""The disks of this machine: plain system calls."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmkv_ray.ownership import is_ours, trouble_with_directory
from lmkv_ray.tiers.disk.medium import FileStatus, Job, OpenFile, Threads, Tree

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class LocalFile:
    """See ``OpenFile``."""

    def __init__(self, fd: int, *, direct: bool) -> None:
        self._fd = fd
        self._direct = direct

    def size(self) -> int:
        """See ``OpenFile``."""
        return os.fstat(self._fd).st_size

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """See ``OpenFile``."""
        return os.preadv(self._fd, buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """See ``OpenFile``."""
        return os.pwritev(self._fd, buffers, offset)

    def allocate(self, nbytes: int) -> None:
        """See ``OpenFile``."""
        os.posix_fallocate(self._fd, 0, nbytes)

    def modified(self) -> float:
        """See ``OpenFile``."""
        return os.fstat(self._fd).st_mtime

    def touch(self, now: float) -> None:
        """See ``OpenFile``."""
        os.utime(self._fd, (now, now))

    def close(self) -> None:
        """See ``OpenFile``."""
        try:
            if not self._direct:  # the kernel's copy is memory that the arena could use
                with contextlib.suppress(OSError):  # a pipe has none
                    os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(self._fd)


class LocalTree:
    """See ``Tree``.

    The directory itself is locked (flock), not a file in it: the lock ends with its owner, needs no
    write permission, and cannot be deleted away under us.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    def names(self) -> set[str]:
        """See ``Tree``."""
        return set(os.listdir(self._fd))  # noqa: PTH208 (a file descriptor)

    def make(self, folder: str) -> None:
        """See ``Tree``."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700, dir_fd=self._fd)

    def foreign(self, folder: str | None) -> tuple[str, str] | None:
        """See ``Tree``."""
        if folder is None:
            return trouble_with_directory(os.fstat(self._fd), self._path)
        with self._opened(folder) as fd:
            return trouble_with_directory(os.fstat(fd), self._path)

    def files(self, folder: str) -> list[FileStatus]:
        """See ``Tree``."""
        found: list[FileStatus] = []
        with self._opened(folder) as fd, os.scandir(fd) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode):
                    blocks = max(status.st_blocks * 512, status.st_size)
                    ours = is_ours(status)
                    found.append(
                        FileStatus(entry.name, status.st_size, blocks, status.st_mtime, ours)
                    )
        return found

    def open(self, path: str, *, direct: bool) -> OpenFile:
        """See ``Tree``."""
        return self._open(path, os.O_RDONLY, direct=direct)

    def create(self, path: str, *, direct: bool) -> OpenFile:
        """See ``Tree``."""
        return self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, direct=direct)

    def rename(self, path: str, to: str) -> None:
        """See ``Tree``."""
        os.rename(path, to, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, path: str) -> None:
        """See ``Tree``."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path, dir_fd=self._fd)

    def sync(self, path: str) -> None:
        """See ``Tree``."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.fsync(self._fd)

    def replaced(self) -> bool:
        """See ``Tree``."""
        return not os.path.samestat(self._path.stat(), os.fstat(self._fd))

    def free(self) -> int:
        """See ``Tree``."""
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """See ``Tree``."""
        os.close(self._fd)

    def _open(self, path: str, flags: int, *, direct: bool) -> OpenFile:
        # What is no file must not make a thread wait for ever: it may be that no process writes
        # into a pipe.
        flags |= os.O_CLOEXEC | os.O_NONBLOCK | (os.O_DIRECT if direct else 0)
        return LocalFile(os.open(path, flags, 0o600, dir_fd=self._fd), direct=direct)

    @contextlib.contextmanager
    def _opened(self, folder: str) -> Iterator[int]:
        fd = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=self._fd)
        try:
            yield fd
        finally:
            os.close(fd)


class LocalThreads:
    """See ``Threads``."""

    def __init__(self, name: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"lmkv-{name}")

    def start(self, job: Job) -> None:
        """See ``Threads``."""
        done = asyncio.get_running_loop().run_in_executor(self._pool, _do, job)
        done.add_done_callback(lambda _: job.end())

    def close(self) -> None:
        """See ``Threads``."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class LocalMedium:
    """See ``Medium``."""

    def open(self, path: Path) -> Tree:
        """See ``Medium``."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, _FOLDER)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return LocalTree(path, fd)

    def threads(self, name: str, count: int) -> Threads:
        """See ``Medium``."""
        return LocalThreads(name, count)


def _do(job: Job) -> None:
    if job.begin():
        job.work()
