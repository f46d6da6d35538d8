"""Bringing chunks that are looked up in a peer's tables: two READs, and nobody there is asked."""

from __future__ import annotations

import mmap
import time
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ROWS_BYTES, SLOT, TAGS_BYTES, DistantArena
from lmkv_ray.index import LANES
from lmkv_ray.keys import key_array
from lmkv_ray.transports.nixl.found import Found
from lmkv_ray.transports.nixl.reading import Reading, Say
from lmkv_ray.transports.nixl.transfers import Numbers, Transfers
from lmkv_ray.transports.nixl.wire import (
    AT_ONCE,
    BRING_MOST,
    ROW,
    SLOT_ROW,
    Bring,
    Brought,
    Failed,
)

KEY_BYTES = TAGS_BYTES + ROWS_BYTES + SLOT.itemsize
"""Read of the tables for each key."""


class Scratch:
    """Registered memory for what is read of peers' tables, by all that may be under way.

    Args:
        agent: ours.
    """

    def __init__(self, agent: Any) -> None:
        nbytes = BRING_MOST * KEY_BYTES
        memory = np.frombuffer(mmap.mmap(-1, AT_ONCE * nbytes), np.uint8)
        agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
        self.free = list(memory.reshape(AT_ONCE, nbytes))


class Bringing:
    """One ``Bring``, from its start to its answer.

    Args:
        bring: what.
        peer: the peer's arena.
        transfers: carry out the READs.
        reading: knows our arena.
        scratch: memory. There must be some; it is given back with the answer.
        say: takes the answer: ``Brought`` or ``Failed``.
    """

    def __init__(
        self,
        bring: Bring,
        peer: DistantArena,
        transfers: Transfers,
        reading: Reading,
        scratch: Scratch,
        say: Say,
    ) -> None:
        self._agent = bring.agent
        self._keys = key_array(bring.keys)
        slots = np.frombuffer(bring.slots, np.uint64).reshape(-1, SLOT_ROW)
        self._here, self._room = slots[:, 0], slots[:, 1].astype(np.int64)
        self._peer = peer
        self._transfers = transfers
        self._reading = reading
        self._scratch = scratch
        self._say = say
        self._memory = memory = scratch.free.pop()
        n = len(self._keys)
        lanes, rows = n * TAGS_BYTES, n * (TAGS_BYTES + ROWS_BYTES)
        self._tags = memory[:lanes].view(np.uint64).reshape(n, LANES)
        self._lanes = memory[lanes:rows].view(np.uint32).reshape(n, LANES)
        self._rows = memory[rows : n * KEY_BYTES].view(SLOT)
        self._began = time.monotonic()
        self._seconds = 0.0

    def start(self) -> None:
        """First READ: what the index says."""
        tags, lanes = self._peer.buckets(self._keys)
        there = np.concatenate([_spans(tags, TAGS_BYTES), _spans(lanes, ROWS_BYTES)])
        here = np.concatenate([_parts(self._tags, TAGS_BYTES), _parts(self._lanes, ROWS_BYTES)])
        self._transfers.post(self._agent, here, there, self._indexed, self._failed)

    def _indexed(self, _: bool) -> None:
        """Second: the rows of the slots it names, and all that is in those slots.

        In whatever order they arrive: bytes with the checksum of a row with the key are the chunk.
        """
        self._seconds = time.monotonic() - self._began
        slots = self._peer.slots_of(self._keys, self._tags, self._lanes)
        named = np.flatnonzero(slots >= 0)
        offsets, sizes = self._peer.places(slots)
        chunks = np.zeros((len(named), ROW), np.uint64)
        chunks[:, 0] = self._here[named]
        chunks[:, 1] = offsets[named]
        chunks[:, 2] = np.minimum(sizes, self._room)[named]
        if not len(named):
            self._arrived(slots, at_once=True)
            return
        rows = (
            _parts(self._rows, SLOT.itemsize)[named],
            _spans(self._peer.rows(slots[named]), SLOT.itemsize),
        )
        arrived = partial(self._arrived, slots)
        self._reading.post(self._agent, self._peer, chunks, arrived, self._failed, rows)

    def _arrived(self, slots: npt.NDArray[np.int64], at_once: bool) -> None:
        rows = self._rows
        there = self._peer.holds(self._keys, slots, rows)
        found = Found(
            (rows["nbytes"] * there).astype(np.int64),
            (self._peer.places(slots)[0] * there).astype(np.uint64),
            rows["generation"].copy(),
            rows["checksum"].copy(),
        )
        self._scratch.free.append(self._memory)
        whole = np.flatnonzero(found.fitting(self._room))
        intact = np.zeros(len(self._keys), np.uint8)

        def verified(these: bytes) -> None:
            intact[whole] = np.frombuffer(these, np.uint8)
            nbytes, offsets, generations, checksums = (a.tobytes() for a in found.arrays)
            brought = Brought(
                nbytes=nbytes, offsets=offsets, generations=generations, checksums=checksums,
                intact=intact.tobytes(), seconds=self._seconds,
            )  # fmt: skip
            self._say(brought)

        self._reading.verify(found.rows(whole, self._here), at_once, verified)

    def _failed(self, why: str) -> None:
        self._scratch.free.append(self._memory)
        self._say(Failed(why=why))


def _spans(addresses: npt.NDArray[np.int64], nbytes: int) -> Numbers:
    spans = np.zeros((len(addresses), 3), np.uint64)
    spans[:, 0] = addresses
    spans[:, 1] = nbytes
    return spans


def _parts(array: npt.NDArray[Any], nbytes: int) -> Numbers:
    """A span for each element of the first dimension."""
    return _spans(array.ctypes.data + np.arange(len(array)) * nbytes, nbytes)
