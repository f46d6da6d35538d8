"""Chunks between files and arena slots. All of this blocks, and may run in several threads.

The payload moves straight between the file and the slot, in one system call for most chunks:
header and the last, incomplete page go through two pages of our own, all else is the slot's.
With encryption there is one buffer for each thread, which the cipher reads from or writes to.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import checksum
from lmkv_ray.clock import Clock
from lmkv_ray.fetch import Failure
from lmkv_ray.tiers.cipher import NONCE_BYTES, Cipher, new_nonce, suite_of
from lmkv_ray.tiers.disk.folder import DiskFolder
from lmkv_ray.tiers.disk.medium import OpenFile
from lmkv_ray.tiers.format import PAGE, ChunkHeader, Label, file_bytes

STEP = 16 << 20
"""Bytes of one system call at most: how often a read looks whether it is still wanted."""
RECENCY_SECONDS = 600.0
"""A file's time is renewed when it is read and older than this; recency survives restarts."""

Bytes = npt.NDArray[np.uint8]
Move = Callable[[list[memoryview], int], int]
"""Moves buffers from or to an offset; how many bytes."""


class ChunkFiles:
    """Reads, writes and removes the files of one suite.

    Args:
        folder: where.
        cipher: how, None for plain.
        writes: how many files are written at a time. With one more thread than that, the medium
            need not wait for checksums and ciphers.
        clock: of the machine: for nonces, and when a file was last used.
    """

    def __init__(
        self, folder: DiskFolder, cipher: Cipher | None, writes: int, clock: Clock
    ) -> None:
        self.folder = folder
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
        folder, temporary = self.folder, self.folder.temporary()
        pages, payload = self._pages(), self._stored(label, chunk)
        nonce = bytes(NONCE_BYTES)
        if self._cipher:
            nonce = new_nonce(self._clock)
            self._cipher.seal(label, nonce, chunk, payload)
        value = 0 if self._cipher else checksum(chunk)
        pages[:PAGE] = ChunkHeader(label, self.overhead, value, nonce).pack()
        whole = len(payload) // PAGE * PAGE
        pages[PAGE:] = bytes(payload[whole:]).ljust(PAGE, b"\0")
        buffers = [pages[:PAGE], payload[:whole], pages[PAGE : PAGE + self._tail(payload)]]
        try:
            with self._medium:
                direct = self._direct(payload)
                with closing(folder.tree.create(temporary, direct=direct)) as file:
                    _transfer(file.write, buffers)
            if intact():
                folder.tree.rename(temporary, label.path(self.suite))
                return True
            folder.tree.remove(temporary)
        except BaseException:
            try:
                folder.tree.remove(temporary)
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
            file = self.folder.tree.open(path, direct=self._direct(payload))
        except FileNotFoundError:
            self.folder.check()  # one file is missing, or everything is
            return Failure.MISSING
        with closing(file):
            result = self._read(file, label, payload, destination, wanted)
        if result is Failure.CORRUPT:
            self.remove(label)
        return result

    def remove(self, label: Label) -> None:
        """Remove a chunk's file, if it is there.

        Raises:
            OSError: what the medium says.
        """
        self.folder.tree.remove(label.path(self.suite))

    def _read(
        self,
        file: OpenFile,
        label: Label,
        payload: memoryview,
        out: Bytes,
        wanted: Callable[[], bool],
    ) -> int | Failure:
        size = self.blocks(label.nbytes)
        if file.size() != size:
            return Failure.CORRUPT
        pages = self._pages()
        whole = len(payload) // PAGE * PAGE
        buffers = [pages[:PAGE], payload[:whole], pages[PAGE : PAGE + self._tail(payload)]]
        done = _transfer(file.read, buffers, wanted)
        if done < size:
            return Failure.CORRUPT if wanted() else Failure.LATE
        payload[whole:] = pages[PAGE : PAGE + len(payload) - whole]
        header = ChunkHeader.unpack(bytes(pages[:PAGE]))
        if header is None or header.label != label or header.overhead != self.overhead:
            return Failure.CORRUPT
        chunk = out[: label.nbytes]
        if self._cipher and not self._cipher.open(label, header.nonce, payload, chunk.data):
            return Failure.CORRUPT
        value = checksum(chunk)
        if not self._cipher and value != header.checksum:
            return Failure.CORRUPT
        now = self._clock.wall()
        with suppress(OSError):  # a hint, on a medium that may be read-only
            if now - file.modified() > RECENCY_SECONDS:
                file.touch(now)
        return value

    def _direct(self, payload: memoryview) -> bool:
        """O_DIRECT wants memory that is aligned as slots are."""
        return self.folder.direct and np.frombuffer(payload, np.uint8).ctypes.data % PAGE == 0

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


def _transfer(
    move: Move, buffers: Sequence[memoryview], wanted: Callable[[], bool] | None = None
) -> int:
    """Move all buffers from or to a file's beginning; fewer bytes at its end or if unwanted."""
    total, done = sum(map(len, buffers)), 0
    while done < total and (wanted is None or wanted()):
        moved = move(_parts(buffers, done, min(done + STEP, total)), done)
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
