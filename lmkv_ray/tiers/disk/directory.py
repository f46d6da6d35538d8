"""The tier's directory: whose it is, what is in it, and whether it works. All of this blocks.

    CACHEDIR.TAG    marks the directory as ours (and as nothing that a backup should hold)
    CLEARED         the number of the last clear that was carried out here
    tmp/            files being written, emptied when the directory is taken into use
    00/ ... ff/     published chunks, by the first byte of their key

The directory itself is locked (flock), not a file in it: the lock ends with its owner, needs no
write permission, and cannot be deleted away under us. It must be ours, and nobody else's to write:
files without encryption are believed for their checksum, which anybody can compute. All paths are
relative to the open directory, so when it is removed or mounted over, we never touch what is in its
place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmkv_ray.clock import Clock
from lmkv_ray.errors import TierError
from lmkv_ray.ownership import is_ours, trouble_with_directory
from lmkv_ray.tiers.format import PAGE, Label, file_bytes, parse_path

TEMPORARY = "tmp"
_FANOUT = [f"{byte:02x}" for byte in range(256)]
_TAG = "CACHEDIR.TAG"
_CLEARED = "CLEARED"
_TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Chunks of a disk tier of lmkv_ray. May be deleted while it is not running.\n"
)
_IGNORED = frozenset({"lost+found"})


class TakenError(TierError):
    """Another shard uses the directory."""


@dataclass(frozen=True, slots=True)
class Found:
    """A published file. What is in it is verified when it is read."""

    label: Label
    blocks: int
    """Bytes it takes on the medium."""
    used: float
    """When it was last used, as far as is known; seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What ``Directory.scan`` found."""

    found: list[Found]
    """What can be served, least recently used first."""
    littered: bool
    """Something could not be removed, on a read-only file system for instance."""


class Directory:
    """An open, locked directory. Made by ``open``."""

    def __init__(self, path: Path, fd: int, clock: Clock) -> None:
        self.path = path
        self._clock = clock
        self.fd = fd
        self.direct = False
        """Whether files may be opened with O_DIRECT; known after ``probe``."""
        self._life = clock.random_bytes(4).hex()
        self._numbers = itertools.count()

    @property
    def closed(self) -> bool:
        """``close`` was called."""
        return self.fd < 0

    @classmethod
    def open(cls, path: Path, clock: Clock) -> Directory:
        """Take a directory into use, making it if need be.

        Args:
            path: of nothing else than this tier.
            clock: of the machine: names of files being written are random.

        Raises:
            TakenError: another process uses it.
            TierError: it holds something else, or it is not ours alone.
            OSError: the medium does not let us.
        """
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), clock)
        try:
            directory._refuse_others(directory.fd)
            directory._lock()
            directory._claim()
        except BaseException:
            directory.close()
            raise
        return directory

    def scan(self, suite: str, overhead: int) -> Scan:
        """List what can be served, and remove the rest.

        Raises:
            TierError: there are chunks of another suite, or a subdirectory is not ours alone;
                nothing was removed.
            OSError: what the medium says.
        """
        found: list[Found] = []
        foreign = 0
        rest = [f"{TEMPORARY}/{file.name}" for file in self._list(TEMPORARY)]
        for prefix in _FANOUT:
            for file in self._list(prefix):
                parsed = parse_path(f"{prefix}/{file.name}")
                status = file.stat(follow_symlinks=False)
                expected = parsed and file_bytes(parsed[0].nbytes, overhead)
                sound = status.st_size == expected and is_ours(status)
                if parsed and parsed[1] == suite and sound:
                    blocks = max(status.st_blocks * 512, status.st_size)
                    found.append(Found(parsed[0], blocks, status.st_mtime))
                    continue
                foreign += bool(parsed and parsed[1] != suite)
                rest.append(f"{prefix}/{file.name}")
        if foreign:
            raise TierError(
                f"The disk tier's directory {self.path} holds {foreign} chunks that were stored "
                "with another encryption key, or without one.",
                next_step="set LMKV_ENCRYPTION_KEY_FILE to the file they were stored with, or, if "
                "they are not wanted any more, empty the directory.",
            )
        littered = False
        for path in rest:
            try:
                self.unlink(path)
            except OSError:
                littered = True
        return Scan(sorted(found, key=lambda file: file.used), littered)

    def probe(self, nbytes: int) -> None:
        """Write, read and remove a file of ``nbytes``; notes whether O_DIRECT works.

        Raises:
            OSError: what the medium says.
        """
        self.check()
        with contextlib.suppress(FileExistsError):
            os.mkdir(TEMPORARY, 0o700, dir_fd=self.fd)
        path = self.temporary()
        try:
            try:
                self._try_file(path, nbytes, os.O_DIRECT)
                self.direct = True
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.unlink(path)
                self._try_file(path, nbytes, 0)
                self.direct = False
        finally:
            with contextlib.suppress(OSError):
                self.unlink(path)

    def check(self) -> None:
        """That our directory is the one that its path names.

        Raises:
            OSError: it was removed, or something was mounted over it.
        """
        if not os.path.samestat(self.path.stat(), os.fstat(self.fd)):
            raise OSError(errno.ESTALE, "the directory was replaced", str(self.path))

    def temporary(self) -> str:
        """A new path in ``TEMPORARY``."""
        return f"{TEMPORARY}/{self._life}-{next(self._numbers)}"

    def unlink(self, path: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path, dir_fd=self.fd)

    def cleared(self) -> int:
        """The number that was noted; 0 if there is none that makes sense.

        Raises:
            OSError: what the medium says.
        """
        try:
            fd = os.open(_CLEARED, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return 0
        with os.fdopen(fd, "rb") as file:
            text = file.read(32)
        return int(text) if text.isdigit() else 0

    def note_cleared(self, number: int) -> None:
        """Note the number of a clear, of which no file is left.

        Raises:
            OSError: what the medium says.
        """
        self.check()
        path = self.temporary()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600, dir_fd=self.fd), "wb") as file:
            file.write(str(number).encode())
        os.rename(path, _CLEARED, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def free(self) -> int:
        """Bytes the file system has left for us."""
        status = os.fstatvfs(self.fd)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """Let go of the directory; others may use it from now on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TakenError(
                f"The disk tier's directory {self.path} is in use by another shard.",
                next_step="set LMKV_DISK_DIR to another directory for each shard of this host "
                f"('fuser -v {self.path}' names the process that has it).",
            ) from error

    def _list(self, name: str) -> Iterator[os.DirEntry[str]]:
        """Regular files (and other things that are no directories) in a subdirectory, made if
        missing.

        Directories in it are not ours; they are left alone.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self.fd)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=self.fd)
        try:
            self._refuse_others(fd)
            with os.scandir(fd) as entries:
                # A list: entries are removed while we look at them.
                for entry in list(entries):
                    if not stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode):
                        yield entry
        finally:
            os.close(fd)

    def _refuse_others(self, fd: int) -> None:
        trouble = trouble_with_directory(os.fstat(fd), self.path)
        if trouble is not None:
            raise TierError(
                f"The disk tier's directory {self.path}, or one in it, {trouble[0]}.",
                next_step=f"{trouble[1]}.",
            )

    def _claim(self) -> None:
        names = set(os.listdir(self.fd)) - _IGNORED  # noqa: PTH208 (a file descriptor)
        if _TAG in names:
            return
        if names:
            raise TierError(
                f"The directory {self.path} is neither empty nor a disk tier of lmkv_ray.",
                next_step="set LMKV_DISK_DIR to an empty or a new directory: what is in a tier's "
                "directory gets deleted.",
            )
        fd = os.open(_TAG, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        try:
            os.write(fd, _TAG_TEXT.encode())
        finally:
            os.close(fd)

    def _try_file(self, path: str, nbytes: int, direct: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | direct
        fd = os.open(path, flags, 0o600, dir_fd=self.fd)
        try:
            with mmap.mmap(-1, PAGE) as page:
                page.write(self._clock.random_bytes(PAGE))
                wrote = page[:]
                if os.pwritev(fd, [page], 0) != PAGE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                page[:] = bytes(PAGE)
                if os.preadv(fd, [page], 0) != PAGE or page[:] != wrote:
                    raise OSError(errno.EIO, "what was written is not what is read")
            os.posix_fallocate(fd, 0, max(nbytes, PAGE))
        finally:
            os.close(fd)
