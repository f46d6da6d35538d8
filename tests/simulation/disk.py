"""A disk of a simulated machine: it outlives processes, and fails as it is told.

It can be slow, stuck, full, read-only, broken or gone, and it can lie. Nothing is on it for good
before ``sync``: ``crash`` (of the machine) loses the newest changes of names, as a journal does,
and tears the content of what was written since. ``kill`` (of the process) loses nothing that was
written, but may stop in the middle of writing a file.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from lmkv_ray.clock import Clock
from lmkv_ray.tiers.disk.medium import FileStatus, Job, OpenFile, Threads, Tree

PAGE = 4096
JOURNAL = 64
"""Changes of names that a crash can take away."""


class KilledError(BaseException):
    """The process ended here. No code of it catches this."""


@dataclass(eq=False)
class _Inode:
    modified: float
    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    """Its content that no crash takes away."""
    allocated: int = 0

    @property
    def blocks(self) -> int:
        return -(-max(len(self.content), self.allocated) // PAGE) * PAGE


Names = dict[str, _Inode]


@dataclass(eq=False)
class _Root:
    """What lies below one path."""

    names: Names = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    history: deque[Names] = field(default_factory=lambda: deque([{}], JOURNAL))
    """What the names were: at the last sync, and after each change since, or the newest of them."""
    owner: SimulatedTree | None = None
    """Has it locked."""


class SimulatedDisk:
    """See ``lmkv_ray.tiers.disk.medium.Medium``.

    Args:
        clock: of the machine: when files were modified.
        random: for all that is a matter of chance.
        capacity: bytes.
    """

    def __init__(self, clock: Clock, random: Random, capacity: int = 1 << 30) -> None:
        self.clock = clock
        self.random = random
        self.capacity = capacity
        self.pace = 0.001
        """Mean seconds that a thread takes for what it is given."""
        self.read_only = False
        self.broken = False
        """Every call fails."""
        self.gone = False
        """It was pulled out."""
        self.stuck = False
        """What a thread begins does not end before ``unstick``."""
        self.lies = 0.0
        """Share of the reads in which one bit is wrong."""
        self._roots: dict[Path, _Root] = {}
        self._threads: list[SimulatedThreads] = []
        self._fuse: int | None = None
        """Calls until the process ends."""

    def open(self, path: Path) -> Tree:
        """See ``Medium``."""
        self.called()
        if path not in self._roots:
            self.called(changes=True)
        root = self._roots.setdefault(path, _Root())
        if root.owner is not None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        root.owner = SimulatedTree(self, root)
        return root.owner

    def threads(self, name: str, count: int) -> Threads:
        """See ``Medium``."""
        threads = SimulatedThreads(self, count)
        self._threads.append(threads)
        return threads

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return sum(inode.blocks for root in self._roots.values() for inode in root.names.values())

    def files(self, path: Path) -> list[str]:
        """The files below a path that was opened."""
        return [*self._roots[path].names]

    def content(self, path: Path, file: str) -> bytearray:
        """What is in a file now; to damage it, change it."""
        return self._roots[path].names[file].content

    def lose(self, path: Path, file: str) -> None:
        """A file is not there any more, and no process was told."""
        del self._roots[path].names[file]

    def unstick(self) -> None:
        """Go on with what has begun."""
        self.stuck = False
        for threads in self._threads:
            threads.go_on()

    def sync(self) -> None:
        """All that is there stays there, whatever happens: as the kernel does now and then."""
        for root in self._roots.values():
            root.history = deque([dict(root.names)], JOURNAL)
            for inode in root.names.values():
                inode.synced = bytes(inode.content)

    def kill(self) -> None:
        """The process that uses the disk ends, somewhere in what its threads are doing."""
        for threads in self._threads:
            for job in threads.abandon():
                self._fuse = self.random.randrange(12)
                try:
                    job.work()
                except KilledError:
                    pass
                finally:
                    self._fuse = None
        self._threads = []
        for root in self._roots.values():
            root.owner = None

    def crash(self) -> None:
        """The machine ends: what was not synced may be lost, or be there in part."""
        self.kill()
        for root in self._roots.values():
            root.names = dict(self.random.choice([*root.history]))
            root.history = deque([dict(root.names)], JOURNAL)
            for inode in root.names.values():
                inode.content = bytearray(self._torn(inode))
                inode.synced = bytes(inode.content)

    def called(self, *, changes: bool = False) -> None:
        """A call comes in; raises what it gets."""
        if self._fuse is not None:
            if not self._fuse:
                raise KilledError
            self._fuse -= 1
        if self.gone:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if changes and self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def _torn(self, inode: _Inode) -> bytes:
        """Content after a crash: each page as it was, as it was to be, or empty."""
        new, old = bytes(inode.content), inode.synced
        if new == old:
            return new
        size = self.random.choice([len(old), len(new)])
        pages = []
        for at in range(0, size, PAGE):
            source = self.random.choice([new, new, old, b""])
            pages.append(source[at : at + PAGE].ljust(PAGE, b"\0"))
        return b"".join(pages)[:size]


class SimulatedTree:
    """See ``Tree``."""

    def __init__(self, disk: SimulatedDisk, root: _Root) -> None:
        self._disk = disk
        self._root = root
        self._closed = False

    def names(self) -> set[str]:
        self._called()
        return {path.split("/")[0] for path in self._root.names} | self._root.folders

    def make(self, folder: str) -> None:
        self._called()
        if folder not in self._root.folders:
            self._called(changes=True)
            self._root.folders.add(folder)

    def foreign(self, folder: str | None) -> tuple[str, str] | None:
        return None

    def files(self, folder: str) -> list[FileStatus]:
        self._called()
        return [
            FileStatus(path.split("/")[1], len(inode.content), inode.blocks, inode.modified, True)
            for path, inode in self._root.names.items()
            if path.startswith(f"{folder}/")
        ]

    def open(self, path: str, *, direct: bool) -> OpenFile:
        self._called()
        return SimulatedFile(self._disk, self._inode(path))

    def create(self, path: str, *, direct: bool) -> OpenFile:
        self._called(changes=True)
        if path in self._root.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        inode = self._root.names[path] = _Inode(self._disk.clock.wall())
        self._changed()
        return SimulatedFile(self._disk, inode)

    def rename(self, path: str, to: str) -> None:
        self._called(changes=True)
        self._root.names[to] = self._inode(path)
        del self._root.names[path]
        self._changed()

    def remove(self, path: str) -> None:
        self._called()
        if path in self._root.names:
            self._called(changes=True)
            del self._root.names[path]
            self._changed()

    def sync(self, path: str) -> None:
        self._called()
        inode = self._inode(path)
        inode.synced = bytes(inode.content)
        for names in self._root.history:
            names[path] = inode

    def replaced(self) -> bool:
        self._called()
        return False

    def free(self) -> int:
        self._called()
        return max(self._disk.capacity - self._disk.used, 0)

    def close(self) -> None:
        self._closed = True
        if self._root.owner is self:
            self._root.owner = None

    def _called(self, *, changes: bool = False) -> None:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._root.owner is not self:
            raise KilledError  # a process that was killed is still at work
        self._disk.called(changes=changes)

    def _changed(self) -> None:
        self._root.history.append(dict(self._root.names))

    def _inode(self, path: str) -> _Inode:
        inode = self._root.names.get(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return inode


class SimulatedFile:
    """See ``OpenFile``."""

    def __init__(self, disk: SimulatedDisk, inode: _Inode) -> None:
        self._disk = disk
        self._inode = inode

    def size(self) -> int:
        self._disk.called()
        return len(self._inode.content)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._disk.called()
        begin = offset
        for buffer in buffers:
            part = bytes(self._inode.content[offset : offset + len(buffer)])
            if part and self._disk.random.random() < self._disk.lies:
                at = self._disk.random.randrange(len(part))
                part = part[:at] + bytes([part[at] ^ 1]) + part[at + 1 :]
            buffer[: len(part)] = part
            offset += len(part)
        return offset - begin

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._disk.called(changes=True)
        data = b"".join(bytes(buffer) for buffer in buffers)
        room = self._room(offset + len(data))
        taken = data[: max(room - offset, 0)]
        if data and not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._inode.content[offset : offset + len(taken)] = taken
        self._inode.modified = self._disk.clock.wall()
        return len(taken)

    def allocate(self, nbytes: int) -> None:
        self._disk.called(changes=True)
        if self._room(nbytes) < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._inode.allocated = nbytes

    def modified(self) -> float:
        self._disk.called()
        return self._inode.modified

    def touch(self, now: float) -> None:
        self._disk.called(changes=True)
        self._inode.modified = now

    def close(self) -> None:
        pass

    def _room(self, wanted: int) -> int:
        """How long the file may become, up to what is wanted."""
        free = self._disk.capacity - self._disk.used + self._inode.blocks
        return min(wanted, max(free // PAGE * PAGE, 0))


class SimulatedThreads:
    """See ``Threads``. What a thread does happens at one moment, a while after it began."""

    def __init__(self, disk: SimulatedDisk, count: int) -> None:
        self._disk = disk
        self._free = count
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, asyncio.TimerHandle | None] = {}
        """With the end of each; None: of what is stuck."""
        self._closed = False

    def start(self, job: Job) -> None:
        self._waiting.append(job)
        self._next()

    def close(self) -> None:
        self._closed = True
        for job in self._waiting:
            job.end()
        self._waiting.clear()

    def go_on(self) -> None:
        """The disk is not stuck any more."""
        for job, end in self._running.items():
            if end is None:
                self._later(job)

    def abandon(self) -> list[Job]:
        """The process has ended: what has begun by now."""
        self._closed = True
        self._waiting.clear()
        running, self._running = self._running, {}
        for end in running.values():
            if end is not None:
                end.cancel()
        return list(running)

    def _next(self) -> None:
        while self._waiting and (self._free or self._closed):
            job = self._waiting.popleft()
            if self._closed or not job.begin():
                job.end()
                continue
            self._free -= 1
            self._running[job] = None
            if not self._disk.stuck:
                self._later(job)

    def _later(self, job: Job) -> None:
        pause = self._disk.random.expovariate(1 / self._disk.pace)
        self._running[job] = asyncio.get_running_loop().call_later(pause, self._end, job)

    def _end(self, job: Job) -> None:
        if self._disk.stuck:
            self._running[job] = None
            return
        del self._running[job]
        job.work()
        self._free += 1
        job.end()
        self._next()
