"""An Ethernet switch in user space, with cables that can be cut, and be long, lossy or faulty."""

from __future__ import annotations

import errno
import heapq
import math
import os
import random
import selectors
import threading
import time
from dataclasses import dataclass, replace

LARGEST = 65_536
FAULTY_FROM = 20_000
"""Frames smaller than this are never damaged: they carry messages, not chunks."""
QUEUE_FRAMES = 4096
"""Delayed frames that are kept; more are lost, as on a real line."""


@dataclass(frozen=True)
class Path:
    """How frames travel from one host to another."""

    cut: bool = False
    delay: float = 0.0
    """Seconds."""
    loss: float = 0.0
    """Share of frames that do not arrive."""
    damage: float = 0.0
    """Share of large frames whose bytes change, unnoticed by TCP's checksum."""
    bytes_left: float = math.inf
    """Bytes that still pass in large frames before it is cut."""


GOOD = Path()


class Switch:
    """Forwards frames between the file descriptors of tap devices, in a thread.

    The host number n has the hardware address 02:00:00:00:00:n.
    """

    def __init__(self) -> None:
        self._taps: dict[int, int] = {}
        self._paths: dict[tuple[int, int], Path] = {}
        self._queue: list[tuple[float, int, int, bytes]] = []
        self._count = 0
        self.damaged = 0
        """Frames whose bytes were changed."""
        self._random = random.Random(0)
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        self._selector.register(self._wake, selectors.EVENT_READ, 0)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="switch", daemon=True)
        self._thread.start()

    def plug(self, number: int, tap: int) -> None:
        """Connect a host; the file descriptor is ours from now on."""
        self._taps[number] = tap
        self._selector.register(tap, selectors.EVENT_READ, number)

    def set_path(self, source: int, target: int, path: Path) -> None:
        """How frames travel from now on, in this direction."""
        self._paths[source, target] = path

    def cut_after(self, source: int, target: int, nbytes: int) -> None:
        """Cut this direction as soon as so many more bytes of chunks have passed."""
        self.set_path(source, target, Path(bytes_left=nbytes))

    def is_cut(self, source: int, target: int) -> bool:
        """Whether nothing passes in this direction."""
        return self._paths.get((source, target), GOOD).cut

    def heal(self) -> None:
        """All paths are good again."""
        self._paths.clear()

    def close(self) -> None:
        """Stop forwarding."""
        self._closing = True
        os.write(self._waker, b"x")
        self._thread.join()
        self._selector.close()
        for fd in (self._wake, self._waker, *self._taps.values()):
            os.close(fd)

    def _run(self) -> None:
        while not self._closing:
            wait = max(self._queue[0][0] - time.monotonic(), 0) if self._queue else None
            for key, _ in self._selector.select(wait):
                if key.data:
                    self._receive(key.fd, key.data)
            while self._queue and self._queue[0][0] <= time.monotonic():
                _, _, target, frame = heapq.heappop(self._queue)
                self._send(target, frame)

    def _receive(self, tap: int, source: int) -> None:
        for _ in range(64):  # then the others' turn
            try:
                frame = os.read(tap, LARGEST)
            except BlockingIOError:
                return
            except OSError:  # the host is gone
                self._selector.unregister(tap)
                return
            known = frame[0] == 2 and frame[5] in self._taps
            for target in (frame[5],) if known else [n for n in self._taps if n != source]:
                self._forward(source, target, frame)

    def _forward(self, source: int, target: int, frame: bytes) -> None:
        path = self._paths.get((source, target), GOOD)
        if path is GOOD:
            self._send(target, frame)
            return
        if path.cut or self._random.random() < path.loss:
            return
        if len(frame) >= FAULTY_FROM:
            if self._random.random() < path.damage:
                frame = self._damaged(frame)
            if path.bytes_left < math.inf:
                left = path.bytes_left - len(frame)
                self.set_path(source, target, replace(path, bytes_left=left, cut=left <= 0))
        if path.delay == 0:
            self._send(target, frame)
        elif len(self._queue) < QUEUE_FRAMES:
            self._count += 1
            due = time.monotonic() + path.delay
            heapq.heappush(self._queue, (due, self._count, target, frame))

    def _damaged(self, frame: bytes) -> bytes:
        """Two different 16-bit words change places: the sum, TCP's checksum, stays the same."""
        middle = len(frame) // 4 * 2
        for at in range(middle, len(frame) - 3, 2):
            one, other = frame[at : at + 2], frame[at + 2 : at + 4]
            if one != other:
                self.damaged += 1
                return frame[:at] + other + one + frame[at + 4 :]
        return frame

    def _send(self, target: int, frame: bytes) -> None:
        try:
            os.write(self._taps[target], frame)
        except OSError as error:  # full: lost, as in any switch; or the host is gone
            if error.errno not in (errno.EAGAIN, errno.EIO, errno.EBADFD, errno.EINVAL):
                raise
