"""SHA-256 of files, of every byte, on several threads.

SHA-256 because the caches of Hugging Face name large files by it (so a model has one identity
whether it lies in such a cache or in a directory), and because processors have instructions for it.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from string import hexdigits

from lmkv_ray.identity.memory import DigestMemory

PIECE_BYTES = 4 << 20
"""Read and hashed at a time, without Python's lock."""

SETTLED_SECONDS = 2.0
"""A file that changed less than this ago could change again without a change of its times, as far
as some file systems tell: its digest is not remembered."""

SHA256_DIGITS = 64
_DIGITS = (40, SHA256_DIGITS)
"""Of names of blobs: small ones are named as Git does."""

NICENESS = 10
"""Of the threads: an engine that starts needs its processors more."""


class StoppedError(Exception):
    """``FileDigests.stop`` was called."""


class FileDigests:
    """Digests of files.

    Args:
        memory: of digests; None: every file is read.
        threads: files that are read at a time.
        now: seconds since 1970.
    """

    def __init__(
        self,
        memory: DigestMemory | None,
        *,
        threads: int = 4,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._memory = memory
        self._threads = threads
        self._now = now
        self._stopping = threading.Event()
        self.bytes_read = 0
        """Of files whose digest was not known."""

    def stop(self) -> None:
        """Let all calls end, with ``StoppedError``."""
        self._stopping.set()

    def of(self, files: Sequence[Path]) -> list[str]:
        """The SHA-256 of each file, as hex.

        Raises:
            OSError: a file cannot be read, or changed while it was.
            StoppedError: see ``stop``.
        """
        if not files:
            return []
        with ThreadPoolExecutor(
            min(self._threads, len(files)), "lmkv-digest", initializer=_be_nice
        ) as pool:
            return list(pool.map(self._digest, files))

    def _digest(self, file: Path) -> str:
        if (named := blob_of(file)) is not None and len(named) == SHA256_DIGITS:
            return named
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                raise OSError(f"{file} is not a regular file")
            if self._memory is not None and (known := self._memory.recall(before)) is not None:
                return known
            began = self._now()
            digest = self._read(fd)
            after = os.fstat(fd)
        finally:
            os.close(fd)
        if _times(before) != _times(after):
            raise OSError(f"{file} changed while it was read")
        changed = max(before.st_mtime, before.st_ctime)
        if self._memory is not None and began - changed >= SETTLED_SECONDS:
            self._memory.note(before, digest)
        return digest

    def _read(self, fd: int) -> str:
        digest, piece, at = sha256(), memoryview(bytearray(PIECE_BYTES)), 0
        while n := os.preadv(fd, [piece], at):
            digest.update(piece[:n])
            at += n
            if self._stopping.is_set():
                raise StoppedError
        self.bytes_read += at
        return digest.hexdigest()


def blob_of(file: Path) -> str | None:
    """The digest that a cache of Hugging Face gave a file as its name: SHA-256 if it is large.

    Such a cache links ``snapshots/REVISION/NAME`` to ``blobs/DIGEST`` once that file is whole. A
    file that was written after its link was made was changed, and is read. Its
    mtime could have been set back, so its ctime must not be later either: a cache that was copied
    is read, once.
    """
    if not file.is_symlink():
        return None
    blob = file.resolve()
    name = blob.name
    if blob.parent.name != "blobs" or len(name) not in _DIGITS or set(name) - set(hexdigits):
        return None
    data, link = blob.stat(), file.lstat()
    linked = data.st_mtime_ns <= link.st_mtime_ns and data.st_ctime_ns <= link.st_ctime_ns
    return name if linked else None


def _times(seen: os.stat_result) -> tuple[int, int, int]:
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def _be_nice() -> None:
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
