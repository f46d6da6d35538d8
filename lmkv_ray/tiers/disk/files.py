"""Chunks between files and arena slots. All of this blocks, and may run in several threads.

The payload moves straight between the file and the slot, in one system call for most chunks:
header and the last, incomplete page go through two pages of our own, all else is the slot's.
With encryption there is one buffer for each thread, which the cipher reads from or writes to.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import checksum
from lmkv_ray.clock import Clock
from lmkv_ray.fetch import Failure
from lmkv_ray.tiers.cipher import NONCE_BYTES, Cipher, new_nonce, suite_of
from lmkv_ray.tiers.disk.directory import Directory
from lmkv_ray.tiers.format import PAGE, Header, Label, file_bytes

STEP = 16 << 20
"""Bytes of one system call at most: how often a read looks whether it is still wanted."""
RECENCY_SECONDS = 600.0
"""A file's time is renewed when it is read and older than this; recency survives restarts."""

Bytes = npt.NDArray[np.uint8]
Call = Callable[[int, list[memoryview], int], int]


class ChunkFiles:
    """Reads, writes and removes the files of one suite.

    Args:
        directory: where.
        cipher: how, None for plain.
        writes: how many files are written at a time. With one more thread than that, the medium
            need not wait for checksums and ciphers.
        clock: of the machine: for nonces, and when a file was last used.
    """

    def __init__(
        self, directory: Directory, cipher: Cipher | None, writes: int, clock: Clock
    ) -> None:
        self.directory = directory
        self.suite = suite_of(cipher)
        self.overhead = cipher.overhead if cipher else 0
        self.littered = False
        """A file could not be removed; only another scan tells what is there."""
        self._cipher = cipher
        self._clock = clock
        self._scratch = threading.local()
        self._medium = threading.BoundedSemaphore(writes)

    def blocks(self, nbytes: int) -> int:
        """Bytes on the medium that a chunk will take."""
        return file_bytes(nbytes, self.overhead)

    def write(self, label: Label, chunk: Bytes, intact: Callable[[], bool]) -> bool:
        """Write and publish a chunk; False if its slot changed meanwhile.

        Not synchronised with the medium: what a power failure leaves is verified when it is read.

        Raises:
            OSError: what the medium says.
        """
        directory, temporary = self.directory, self.directory.temporary()
        pages, payload = self._pages(), self._stored(label, chunk)
        nonce = bytes(NONCE_BYTES)
        if self._cipher:
            nonce = new_nonce(self._clock)
            self._cipher.seal(label, nonce, chunk, payload)
        value = 0 if self._cipher else checksum(chunk)
        pages[:PAGE] = Header(label, self.overhead, value, nonce).pack()
        whole = len(payload) // PAGE * PAGE
        pages[PAGE:] = bytes(payload[whole:]).ljust(PAGE, b"\0")
        buffers = [pages[:PAGE], payload[:whole], pages[PAGE : PAGE + self._tail(payload)]]
        try:
            with self._medium:
                fd = self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, payload)
                try:
                    _transfer(os.pwritev, fd, buffers)
                    self._uncache(fd)
                finally:
                    os.close(fd)
            if intact():
                os.rename(
                    temporary, label.path(self.suite),
                    src_dir_fd=directory.fd, dst_dir_fd=directory.fd,
                )  # fmt: skip
                return True
            directory.unlink(temporary)
        except BaseException:
            try:
                directory.unlink(temporary)
            except OSError:
                self.littered = True
            raise
        return False

    def read(self, label: Label, destination: Bytes, wanted: Callable[[], bool]) -> int | Failure:
        """Read a chunk into the first bytes of a slot, and verify it there.

        What is not sound is removed.

        Args:
            label: what it must be.
            destination: at least ``label.nbytes``.
            wanted: asked now and then; if not, the failure is ``LATE``.

        Returns:
            ``arena.checksum`` of the chunk in the slot, or why it is not there.

        Raises:
            OSError: what the medium says.
        """
        path = label.path(self.suite)
        payload = self._stored(label, destination)
        try:
            fd = self._open(path, os.O_RDONLY, payload)
        except FileNotFoundError:
            self.directory.check()  # one file is missing, or everything is
            return Failure.MISSING
        try:
            result = self._read(fd, label, payload, destination, wanted)
            self._uncache(fd)
        finally:
            os.close(fd)
        if result is Failure.CORRUPT:
            self.remove(label)
        return result

    def remove(self, label: Label) -> None:
        """Remove a chunk's file, if it is there.

        Raises:
            OSError: what the medium says.
        """
        self.directory.unlink(label.path(self.suite))

    def _read(
        self, fd: int, label: Label, payload: memoryview, out: Bytes, wanted: Callable[[], bool]
    ) -> int | Failure:
        status = os.fstat(fd)
        size = self.blocks(label.nbytes)
        if status.st_size != size:
            return Failure.CORRUPT
        pages = self._pages()
        whole = len(payload) // PAGE * PAGE
        buffers = [pages[:PAGE], payload[:whole], pages[PAGE : PAGE + self._tail(payload)]]
        done = _transfer(os.preadv, fd, buffers, wanted)
        if done < size:
            return Failure.CORRUPT if wanted() else Failure.LATE
        payload[whole:] = pages[PAGE : PAGE + len(payload) - whole]
        header = Header.unpack(bytes(pages[:PAGE]))
        if header is None or header.label != label or header.overhead != self.overhead:
            return Failure.CORRUPT
        chunk = out[: label.nbytes]
        if self._cipher and not self._cipher.open(label, header.nonce, payload, chunk.data):
            return Failure.CORRUPT
        value = checksum(chunk)
        if not self._cipher and value != header.checksum:
            return Failure.CORRUPT
        if self._clock.wall() - status.st_mtime > RECENCY_SECONDS:
            with contextlib.suppress(OSError):  # a hint, on a medium that may be read-only
                os.utime(fd, (self._clock.wall(),) * 2)
        return value

    def _open(self, path: str, flags: int, payload: memoryview) -> int:
        # O_DIRECT wants memory that is aligned as slots are.
        aligned = np.frombuffer(payload, np.uint8).ctypes.data % PAGE == 0
        direct = os.O_DIRECT if self.directory.direct and aligned else 0
        return os.open(path, flags | direct | os.O_CLOEXEC, 0o600, dir_fd=self.directory.fd)

    def _stored(self, label: Label, chunk: Bytes) -> memoryview:
        """Where the payload as stored is: the slot itself, or this thread's buffer."""
        if not self._cipher:
            return chunk[: label.nbytes].data
        nbytes = label.nbytes + self.overhead
        buffer: mmap.mmap | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._scratch.buffer = mmap.mmap(-1, -(-nbytes // PAGE) * PAGE)
        return memoryview(buffer)[:nbytes]

    def _pages(self) -> memoryview:
        """Two aligned pages of this thread: for the header and for the last part of a payload."""
        if not hasattr(self._scratch, "pages"):
            self._scratch.pages = memoryview(mmap.mmap(-1, 2 * PAGE))
        pages: memoryview = self._scratch.pages
        return pages

    def _tail(self, payload: memoryview) -> int:
        return PAGE if len(payload) % PAGE else 0

    def _uncache(self, fd: int) -> None:
        """Without O_DIRECT: do not keep the kernel's copy, it is memory the arena could use."""
        if not self.directory.direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _transfer(
    call: Call, fd: int, buffers: Sequence[memoryview], wanted: Callable[[], bool] | None = None
) -> int:
    """Move all buffers from or to a file's beginning; fewer bytes at its end or if unwanted."""
    total, done = sum(map(len, buffers)), 0
    while done < total and (wanted is None or wanted()):
        moved = call(fd, _parts(buffers, done, min(done + STEP, total)), done)
        done += moved
        if not moved:
            break
    return done


def _parts(buffers: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """The bytes from ``start`` to ``stop`` of buffers that are thought of as one."""
    parts, at = [], 0
    for buffer in buffers:
        part = buffer[max(start - at, 0) : max(stop - at, 0)]
        if len(part):
            parts.append(part)
        at += len(buffer)
    return parts
