"""Looking chunks up in a peer's tables: two READs, and nobody there is asked."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ROWS_BYTES, SLOT, TAGS_BYTES, DistantArena
from lmkv_ray.index import LANES
from lmkv_ray.keys import KeyArray
from lmkv_ray.transports.nixl.found import Found
from lmkv_ray.transports.nixl.transfers import Numbers, Transfers
from lmkv_ray.transports.nixl.wire import AT_ONCE, BRING_MOST

KEY_BYTES = TAGS_BYTES + ROWS_BYTES + SLOT.itemsize
"""Read for each key."""


class Scratch:
    """Registered memory for what is read of peers' tables, by all looks that may be under way.

    Args:
        agent: ours.
    """

    def __init__(self, agent: Any) -> None:
        nbytes = BRING_MOST * KEY_BYTES
        memory = np.frombuffer(mmap.mmap(-1, AT_ONCE * nbytes), np.uint8)
        agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
        self.free = list(memory.reshape(AT_ONCE, nbytes))


class Looking:
    """One look, from its start to its end.

    Args:
        agent: the peer's.
        keys: of which chunks, uint64[n, 2].
        arena: the peer's.
        transfers: carry out the READs.
        scratch: their memory. There must be some; it is given back at the end.
        found: called at the end, with what the tables say and the seconds the first READ took.
        failed: called instead when they could not be read, with the reason.
    """

    def __init__(
        self,
        agent: str,
        keys: KeyArray,
        arena: DistantArena,
        transfers: Transfers,
        scratch: Scratch,
        found: Callable[[Found, float], None],
        failed: Callable[[str], None],
    ) -> None:
        self._agent = agent
        self._keys = keys
        self._arena = arena
        self._transfers = transfers
        self._scratch = scratch
        self._found = found
        self._failed = failed
        self._memory = memory = scratch.free.pop()
        n = len(self._keys)
        rows, slots = n * TAGS_BYTES, n * (TAGS_BYTES + ROWS_BYTES)
        self._tags = memory[:rows].view(np.uint64).reshape(n, LANES)
        self._rows = memory[rows:slots].view(np.uint32).reshape(n, LANES)
        self._slots = memory[slots : n * KEY_BYTES].view(SLOT)
        self._began = time.monotonic()
        self._seconds = 0.0

    def start(self) -> None:
        """First READ: what the index says."""
        tags, rows = self._arena.buckets(self._keys)
        there = np.concatenate([_spans(tags, TAGS_BYTES), _spans(rows, ROWS_BYTES)])
        here = np.concatenate([_parts(self._tags, TAGS_BYTES), _parts(self._rows, ROWS_BYTES)])
        self._transfers.post(self._agent, here, there, self._indexed, self._fail)

    def _indexed(self, _: bool) -> None:
        """Second: the rows of the slots it names."""
        self._seconds = time.monotonic() - self._began
        slots = self._arena.slots_of(self._keys, self._tags, self._rows)
        named = slots >= 0
        there = _spans(self._arena.rows(slots[named]), SLOT.itemsize)
        here = _parts(self._slots, SLOT.itemsize)[named]
        if named.any():
            done = lambda _: self._end(slots)  # noqa: E731
            self._transfers.post(self._agent, here, there, done, self._fail)
        else:
            self._end(slots)

    def _end(self, slots: npt.NDArray[np.int64]) -> None:
        rows = self._slots
        there, offsets = self._arena.chunks(self._keys, slots, rows)
        found = Found(
            (rows["nbytes"] * there).astype(np.int64),
            (offsets * there).astype(np.uint64),
            rows["generation"].copy(),
            rows["checksum"].copy(),
        )
        self._scratch.free.append(self._memory)
        self._found(found, self._seconds)

    def _fail(self, why: str) -> None:
        self._scratch.free.append(self._memory)
        self._failed(why)


def _spans(addresses: npt.NDArray[np.int64], nbytes: int) -> Numbers:
    spans = np.zeros((len(addresses), 3), np.uint64)
    spans[:, 0] = addresses
    spans[:, 1] = nbytes
    return spans


def _parts(array: npt.NDArray[Any], nbytes: int) -> Numbers:
    """A span for each element of the first dimension."""
    return _spans(array.ctypes.data + np.arange(len(array)) * nbytes, nbytes)
