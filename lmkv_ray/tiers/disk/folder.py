"""The folder of a disk tier: whose it is, what is in it, and whether it works. All of this blocks.

    CACHEDIR.TAG    marks the folder as ours (and as nothing that a backup should hold)
    CLEARED         the number of the last clear that was carried out here
    tmp/            files being written, emptied when the folder is taken into use
    00/ ... ff/     published chunks, by the first byte of their key

It must be this user's, and no other user's to write: files without encryption are believed for
their checksum, which any program can compute.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lmkv_ray.clock import Clock
from lmkv_ray.errors import TierError
from lmkv_ray.tiers.disk.medium import FileStatus, Medium, Tree
from lmkv_ray.tiers.format import PAGE, Label, file_bytes, parse_path

TEMPORARY = "tmp"
MOST = 1 << 62
"""No clear has a higher number: they are times, in nanoseconds."""
_FANOUT = [f"{byte:02x}" for byte in range(256)]
_TAG = "CACHEDIR.TAG"
_CLEARED = "CLEARED"
_TAG_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# Chunks of a disk tier of lmkv_ray. May be deleted while it is not running.\n"
)
_IGNORED = frozenset({"lost+found"})


class TakenError(TierError):
    """Another shard uses the folder."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A published file. What is in it is verified when it is read."""

    label: Label
    blocks: int
    """Bytes it takes on the medium."""
    used: float
    """When it was last used, as far as is known; seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What ``DiskFolder.scan`` found."""

    found: list[FoundFile]
    """What can be served, least recently used first."""
    littered: bool
    """Something could not be removed, on a read-only file system for instance."""


class DiskFolder:
    """An open, locked folder. Made by ``open``."""

    def __init__(self, path: Path, tree: Tree, clock: Clock) -> None:
        self.path = path
        self.tree = tree
        self.direct = False
        """Whether files may be opened with O_DIRECT; known after ``probe``."""
        self.closed = False
        """``close`` was called."""
        self._clock = clock
        self._life = clock.random_bytes(4).hex()
        self._numbers = itertools.count()

    @classmethod
    def open(cls, path: Path, medium: Medium, clock: Clock) -> DiskFolder:
        """Take a folder into use, making it if need be.

        Args:
            path: of nothing else than this tier.
            medium: has the folder.
            clock: of the machine: names of files being written are random.

        Raises:
            TakenError: another process uses it.
            TierError: it holds something else, or it is not ours alone.
            OSError: the medium does not let us.
        """
        try:
            tree = medium.open(path)
        except BlockingIOError as error:
            raise TakenError(
                f"The disk tier's directory {path} is in use by another shard.",
                next_step="set LMKV_DISK_DIR to another directory for each shard of this host "
                f"('fuser -v {path}' names the process that has it).",
            ) from error
        folder = cls(path, tree, clock)
        try:
            folder._refuse_others(None)
            folder._claim()
        except BaseException:
            folder.close()
            raise
        return folder

    def scan(self, suite: str, overhead: int) -> Scan:
        """List what can be served, and remove the rest.

        Raises:
            TierError: there are chunks of another suite, or a subdirectory is not ours alone;
                nothing was removed.
            OSError: what the medium says.
        """
        found: list[FoundFile] = []
        foreign = 0
        rest = [f"{TEMPORARY}/{file.name}" for file in self._list(TEMPORARY)]
        for prefix in _FANOUT:
            for file in self._list(prefix):
                parsed = parse_path(f"{prefix}/{file.name}")
                expected = parsed and file_bytes(parsed[0].nbytes, overhead)
                if parsed and parsed[1] == suite and file.size == expected and file.ours:
                    found.append(FoundFile(parsed[0], file.blocks, file.modified))
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
                self.tree.remove(path)
            except OSError:
                littered = True
        return Scan(sorted(found, key=lambda file: file.used), littered)

    def probe(self, nbytes: int) -> None:
        """Write, read and remove a file of ``nbytes``; notes whether O_DIRECT works.

        Raises:
            OSError: what the medium says.
        """
        self.check()
        self.tree.make(TEMPORARY)
        path = self.temporary()
        try:
            try:
                self._try_file(path, nbytes, direct=True)
                self.direct = True
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.tree.remove(path)
                self._try_file(path, nbytes, direct=False)
                self.direct = False
        finally:
            with contextlib.suppress(OSError):
                self.tree.remove(path)

    def check(self) -> None:
        """That our folder is the one that its path names.

        Raises:
            OSError: it was removed, or something was mounted over it.
        """
        if self.tree.replaced():
            raise OSError(errno.ESTALE, "the directory was replaced", str(self.path))

    def temporary(self) -> str:
        """A new path in ``TEMPORARY``."""
        return f"{TEMPORARY}/{self._life}-{next(self._numbers)}"

    def cleared(self) -> int:
        """The number that was noted; 0 if there is none that makes sense.

        Raises:
            OSError: what the medium says.
        """
        try:
            file = self.tree.open(_CLEARED, direct=False)
        except FileNotFoundError:
            return 0
        text = bytearray(64)
        with contextlib.closing(file):
            number, _, check = bytes(text[: file.read([memoryview(text)], 0)]).partition(b" ")
        # A wrong number that is higher would keep later clears from being carried out.
        sound = number.isdigit() and check == _check_of(number) and int(number) <= MOST
        return int(number) if sound else 0

    def note_cleared(self, number: int) -> None:
        """Note the number of a clear, of which no file is left.

        Raises:
            OSError: what the medium says.
        """
        self.check()
        path = self.temporary()
        text = b"%d" % number
        self._write(path, text + b" " + _check_of(text))
        self.tree.rename(path, _CLEARED)

    def close(self) -> None:
        """Let go of the folder; others may use it from now on."""
        if not self.closed:
            self.closed = True
            self.tree.close()

    def _list(self, name: str) -> list[FileStatus]:
        """Files in a subdirectory, made if missing. Directories in it are left alone."""
        self.tree.make(name)
        self._refuse_others(name)
        return self.tree.files(name)

    def _refuse_others(self, name: str | None) -> None:
        trouble = self.tree.foreign(name)
        if trouble is not None:
            raise TierError(
                f"The disk tier's directory {self.path}, or one in it, {trouble[0]}.",
                next_step=f"{trouble[1]}.",
            )

    def _claim(self) -> None:
        names = self.tree.names() - _IGNORED
        if _TAG in names:
            return
        if names:
            raise TierError(
                f"The directory {self.path} is neither empty nor a disk tier of lmkv_ray.",
                next_step="set LMKV_DISK_DIR to an empty or a new directory: what is in a tier's "
                "directory gets deleted.",
            )
        self._write(_TAG, _TAG_TEXT)
        # Once in the life of the folder: without it, a crash of the machine could leave chunks in
        # a folder that we would not take for ours.
        self.tree.sync(_TAG)

    def _write(self, path: str, content: bytes) -> None:
        with contextlib.closing(self.tree.create(path, direct=False)) as file:
            file.write([memoryview(content)], 0)

    def _try_file(self, path: str, nbytes: int, *, direct: bool) -> None:
        with (
            contextlib.closing(self.tree.create(path, direct=direct)) as file,
            mmap.mmap(-1, PAGE) as page,
        ):
            page.write(self._clock.random_bytes(PAGE))
            wrote = page[:]
            with memoryview(page) as view:
                if file.write([view], 0) != PAGE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                page[:] = bytes(PAGE)
                if file.read([view], 0) != PAGE or page[:] != wrote:
                    raise OSError(errno.EIO, "what was written is not what is read")
            file.allocate(max(nbytes, PAGE))


def _check_of(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode()
