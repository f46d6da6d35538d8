"""Pins the arena for a device, piece by piece.

Copies of pinned memory run at the speed of the link and wait for nobody; others are several times
slower and hold up the thread that queues them. Pinning takes a while (faulting in 8 GiB that nobody
touched: 5 s on one thread; registering them then: 0.3 s). There are two times for it:

* ``prepare``, while the engine starts, on its own thread and for a bounded time. Then nothing until
  ``attach``: in between the engine captures its graphs, and CUDA does not let memory be registered
  then, by whatever thread (docs/gpu.md).
* from ``attach`` on, in a thread of Pinning's own: what was left, and what the shard assigns later.

Until a piece is pinned its copies take the slower path.

No copy may touch pinned and other memory at once, or two pieces: so pieces consist of whole
extents, which no slot crosses.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena.prefault import prefault
from lmkv_ray.transfer.base import Arena, Bytes, Ints

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 30
"""Registered with one call: small enough to be useful soon."""

CLOSE_SECONDS = 10.0


class Registry(Protocol):
    """What pinning needs of a ``Device``, documented there."""

    name: str

    def enter(self) -> None:
        """Make this the current device of the calling thread."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory of the host."""

    def unregister(self, address: int) -> None:
        """Undo ``register``."""


@dataclass(eq=False)
class _Pinned:
    """An arena, as far as it is pinned. Its memory stays mapped as long as this lives."""

    arena: weakref.ref[Arena]
    """Dead when neither the worker nor any copy uses the arena any more."""
    data: Bytes
    extent_bytes: int
    extents: npt.NDArray[np.bool_]
    """Which are pinned."""
    addresses: list[int]
    """Of the pieces."""
    attached: bool = False
    """Else nothing may be pinned in the background yet."""


class Pinning:
    """What is pinned of the arenas that were attached.

    Args:
        registry: pins.
        piece_bytes: at most so much with one call, but at least one extent.
    """

    def __init__(self, registry: Registry, *, piece_bytes: int = PIECE_BYTES) -> None:
        self._registry = registry
        self._piece_bytes = piece_bytes
        self._arenas: list[_Pinned] = []
        self._refused = False
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lmkv-pin", daemon=True)
        self._thread.start()

    def prepare(self, arena: Arena, within: float) -> tuple[int, int]:
        """Pin what can be pinned in so many seconds, now; it is let go of when the arena dies.

        Returns:
            bytes that are pinned, and bytes that have memory.
        """
        pinned = self._entry(arena)
        self._pin(pinned, arena, time.monotonic() + within)
        whole = sum(nbytes for _, nbytes in arena.assigned())
        return min(int(pinned.extents.sum()) * pinned.extent_bytes, whole), whole

    def attach(self, arena: Arena) -> None:
        """Pin this arena from now on, and let go of others when nothing uses them any more."""
        self._entry(arena).attached = True
        self._wake.set()

    def look(self) -> None:
        """Go on if the arena has grown; costs microseconds."""
        if self._arenas and (arena := self._arenas[-1].arena()) is not None and arena.grown:
            self._wake.set()

    def covers(self, arena: Arena, at: Ints) -> npt.NDArray[np.bool_]:
        """bool[n]: whether the extents are pinned in which these offsets of ``data`` lie."""
        for pinned in self._arenas:
            if pinned.arena() is arena:
                covered: npt.NDArray[np.bool_] = pinned.extents[at // pinned.extent_bytes]
                return covered
        return np.zeros(len(at), np.bool_)

    def close(self) -> None:
        """Unpin everything; no copy may be under way."""
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("lmkv_ray: memory is still being pinned after %.0f s.", CLOSE_SECONDS)

    def _entry(self, arena: Arena) -> _Pinned:
        """What is known of an arena, as the last of all."""
        others = [pinned for pinned in self._arenas if pinned.arena() is not arena]
        mine = [pinned for pinned in self._arenas if pinned.arena() is arena]
        if not mine:
            extents = np.zeros(-(-len(arena.data) // arena.extent_bytes), np.bool_)
            ref: weakref.ref[Arena] = weakref.ref(arena, lambda _: self._wake.set())
            mine = [_Pinned(ref, arena.data, arena.extent_bytes, extents, [])]
        self._arenas = others + mine  # a new list, as the others are read without a lock
        return mine[0]

    # -- the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._registry.enter()
        except Exception as error:
            self._refuse(error)
        while True:
            self._wake.wait()
            self._wake.clear()
            for pinned in self._arenas:
                arena = None if self._closing else pinned.arena()
                try:
                    if arena is None:
                        self._unpin(pinned)
                    elif pinned.attached:
                        self._pin(pinned, arena)
                        self._populate(arena)
                except Exception as error:
                    self._refuse(error)
                del arena  # not to keep it alive
            if self._closing:
                return

    def _pin(self, pinned: _Pinned, arena: Arena, deadline: float = math.inf) -> None:
        base = pinned.data.ctypes.data
        for first, end in self._pieces(pinned, arena):
            if self._refused or self._closing or time.monotonic() >= deadline:
                return
            offset = first * pinned.extent_bytes
            nbytes = min(end * pinned.extent_bytes, len(pinned.data)) - offset
            try:
                # Pinning would do it too, but on one thread.
                prefault(pinned.data[offset : offset + nbytes], stop=lambda: self._closing)
                self._registry.register(base + offset, nbytes)
            except Exception as error:
                self._refuse(error)
                return
            pinned.addresses.append(base + offset)
            pinned.extents[first:end] = True

    def _populate(self, arena: Arena) -> None:
        """Fault in what could not be pinned; the arena takes note of all."""
        for _ in arena.populate():
            if self._closing:
                return

    def _pieces(self, pinned: _Pinned, arena: Arena) -> Iterator[tuple[int, int]]:
        """Extents (first, end) that have memory and are not pinned."""
        new = np.zeros(len(pinned.extents) + 1, np.int8)
        for offset, nbytes in arena.assigned():
            first = offset // pinned.extent_bytes
            new[first : first + -(-nbytes // pinned.extent_bytes)] = 1
        new[:-1] &= ~pinned.extents
        edges = np.flatnonzero(np.diff(new, prepend=np.int8(0))).reshape(-1, 2)
        step = max(1, self._piece_bytes // pinned.extent_bytes)
        for begin, end in edges.tolist():
            for first in range(begin, end, step):
                yield first, min(first + step, end)

    def _unpin(self, pinned: _Pinned) -> None:
        self._arenas = [other for other in self._arenas if other is not pinned]
        pinned.extents[:] = False
        for address in pinned.addresses:
            try:
                self._registry.unregister(address)
            except Exception as error:
                logger.warning("lmkv_ray: a part of the arena stays pinned: %s", error)

    def _refuse(self, error: Exception) -> None:
        if not self._refused:
            self._refused = True
            logger.warning(
                "lmkv_ray: %s cannot pin the arena (%s); loads and saves go on at a fraction of "
                "the speed. Next step: allow this process to lock memory (ulimit -l unlimited, "
                "docker run --ulimit memlock=-1) and restart the engine.",
                self._registry.name,
                error,
            )
