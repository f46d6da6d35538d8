"""Registers the arena for a device, piece by piece.

Copies of registered memory run at the speed of the link, without waiting; others are several times
slower and hold up the thread that queues them. Registration takes a while (faulting in 8 GiB that
were not
touched: 5 s on one thread; registering them then: 0.3 s). There are two times for it:

* ``prepare``, while the engine starts, on its own thread and for a bounded time. Then nothing until
  ``attach``: in between the engine captures its graphs, and CUDA does not let memory be registered
  then, by whatever thread (docs/gpu.md).
* from ``attach`` on, in a thread of Registration's own: what was left, and what the shard assigns
  later.

Until a piece is registered its copies take the slower path.

No copy may touch registered and other memory at once, or two pieces: so pieces consist of whole
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
    """What registration needs of a ``Device``, documented there."""

    name: str

    def enter(self) -> None:
        """Make this the current device of the calling thread."""

    def register(self, address: int, nbytes: int) -> None:
        """Register memory of the host."""

    def unregister(self, address: int) -> None:
        """Undo ``register``."""


@dataclass(eq=False)
class _Registered:
    """An arena, as far as it is registered. Its memory stays mapped as long as this lives."""

    arena: weakref.ref[Arena]
    """Dead when neither the worker nor any copy uses the arena any more."""
    data: Bytes
    extent_bytes: int
    extents: npt.NDArray[np.bool_]
    """Which are registered."""
    addresses: list[int]
    """Of the pieces."""
    attached: bool = False
    """Else nothing may be registered in the background yet."""


class Registration:
    """What is registered of the arenas that were attached.

    Args:
        registry: registers.
        piece_bytes: at most so much with one call, but at least one extent.
    """

    def __init__(self, registry: Registry, *, piece_bytes: int = PIECE_BYTES) -> None:
        self._registry = registry
        self._piece_bytes = piece_bytes
        self._arenas: list[_Registered] = []
        self._refused = False
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lmkv-register", daemon=True)
        self._thread.start()

    def prepare(self, arena: Arena, within: float) -> tuple[int, int]:
        """Register what can be registered in so many seconds, now; it is let go of when the arena
        dies.

        Returns:
            bytes that are registered, and bytes that have memory.
        """
        registered = self._entry(arena)
        self._register(registered, arena, time.monotonic() + within)
        whole = sum(nbytes for _, nbytes in arena.assigned())
        return min(int(registered.extents.sum()) * registered.extent_bytes, whole), whole

    def attach(self, arena: Arena) -> None:
        """Register this arena from now on, and let go of others when nothing uses them any more."""
        self._entry(arena).attached = True
        self._wake.set()

    def look(self) -> None:
        """Go on if the arena has grown; costs microseconds."""
        if self._arenas and (arena := self._arenas[-1].arena()) is not None and arena.grown:
            self._wake.set()

    def covers(self, arena: Arena, at: Ints) -> npt.NDArray[np.bool_]:
        """bool[n]: whether the extents are registered in which these offsets of ``data`` lie."""
        for registered in self._arenas:
            if registered.arena() is arena:
                covered: npt.NDArray[np.bool_] = registered.extents[at // registered.extent_bytes]
                return covered
        return np.zeros(len(at), np.bool_)

    def close(self) -> None:
        """Deregister everything; no copy may be under way."""
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "lmkv_ray: memory is still being registered after %.0f s.", CLOSE_SECONDS
            )

    def _entry(self, arena: Arena) -> _Registered:
        """What is known of an arena, as the last of all."""
        others = [registered for registered in self._arenas if registered.arena() is not arena]
        mine = [registered for registered in self._arenas if registered.arena() is arena]
        if not mine:
            extents = np.zeros(-(-len(arena.data) // arena.extent_bytes), np.bool_)
            ref: weakref.ref[Arena] = weakref.ref(arena, lambda _: self._wake.set())
            mine = [_Registered(ref, arena.data, arena.extent_bytes, extents, [])]
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
            for registered in self._arenas:
                arena = None if self._closing else registered.arena()
                try:
                    if arena is None:
                        self._deregister(registered)
                    elif registered.attached:
                        self._register(registered, arena)
                        self._populate(arena)
                except Exception as error:
                    self._refuse(error)
                del arena  # not to keep it alive
            if self._closing:
                return

    def _register(self, registered: _Registered, arena: Arena, deadline: float = math.inf) -> None:
        base = registered.data.ctypes.data
        for first, end in self._pieces(registered, arena):
            if self._refused or self._closing or time.monotonic() >= deadline:
                return
            offset = first * registered.extent_bytes
            nbytes = min(end * registered.extent_bytes, len(registered.data)) - offset
            try:
                # Registration would do it too, but on one thread.
                prefault(registered.data[offset : offset + nbytes], stop=lambda: self._closing)
                self._registry.register(base + offset, nbytes)
            except Exception as error:
                self._refuse(error)
                return
            registered.addresses.append(base + offset)
            registered.extents[first:end] = True

    def _populate(self, arena: Arena) -> None:
        """Fault in what could not be registered; the arena takes note of all."""
        for _ in arena.populate():
            if self._closing:
                return

    def _pieces(self, registered: _Registered, arena: Arena) -> Iterator[tuple[int, int]]:
        """Extents (first, end) that have memory and are not registered."""
        new = np.zeros(len(registered.extents) + 1, np.int8)
        for offset, nbytes in arena.assigned():
            first = offset // registered.extent_bytes
            new[first : first + -(-nbytes // registered.extent_bytes)] = 1
        new[:-1] &= ~registered.extents
        edges = np.flatnonzero(np.diff(new, prepend=np.int8(0))).reshape(-1, 2)
        step = max(1, self._piece_bytes // registered.extent_bytes)
        for begin, end in edges.tolist():
            for first in range(begin, end, step):
                yield first, min(first + step, end)

    def _deregister(self, registered: _Registered) -> None:
        self._arenas = [other for other in self._arenas if other is not registered]
        registered.extents[:] = False
        for address in registered.addresses:
            try:
                self._registry.unregister(address)
            except Exception as error:
                logger.warning("lmkv_ray: a part of the arena stays registered: %s", error)

    def _refuse(self, error: Exception) -> None:
        if not self._refused:
            self._refused = True
            logger.warning(
                "lmkv_ray: %s cannot register the arena (%s); loads and saves go on at a fraction "
                "of the speed. Next step: allow this process to lock memory (ulimit -l unlimited, "
                "docker run --ulimit memlock=-1) and restart the engine.",
                self._registry.name,
                error,
            )
