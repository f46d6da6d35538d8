"""The peer's side of a fetch: chunks out of an arena, validated and with checksums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaReader, checksum
from lmkv_ray.keys import KeyArray

BATCH_BYTES = 32 << 20
"""Payload of one batch: large enough for full speed, small enough to be held several times."""
MISSING = -1
CHANGED = -2


@dataclass(frozen=True)
class Batch:
    """Chunks on their way to another node."""

    nbytes: npt.NDArray[np.int64]
    """For each key asked for: the size of its chunk, or ``MISSING`` or ``CHANGED``."""
    checksums: npt.NDArray[np.uint64]
    """For each key asked for: ``arena.checksum`` of its chunk, or 0."""
    payload: npt.NDArray[np.uint8]
    """The chunks that are there, one after the other."""


class ChunkReader:
    """Reads chunks of an arena for peers. May be used by several threads at once.

    Args:
        reader: the arena.
        limit: bytes of payload in one batch (one chunk may be larger). What would be more is
            reported as missing; a fetching shard of the same settings never asks for more.
    """

    def __init__(self, reader: ArenaReader, limit: int = BATCH_BYTES) -> None:
        self._reader = reader
        self._limit = limit

    def read(self, keys: KeyArray) -> Batch:
        """Copy out what is there of ``keys``. Call it in a thread: it takes 0.2 ms a MiB."""
        reader = self._reader
        hits = reader.lookup(keys)
        wanted = hits.nbytes * hits.found
        ends = np.cumsum(wanted)
        sent = hits.found & ((ends <= self._limit) | (ends == wanted))
        nbytes = np.where(sent, hits.nbytes, MISSING)
        checksums = np.zeros(len(keys), np.uint64)
        positions = np.flatnonzero(sent)
        if not len(positions):
            return Batch(nbytes, checksums, np.empty(0, np.uint8))

        payload = np.empty(int(wanted[sent].sum()), np.uint8)
        checksums[positions] = reader.checksums(hits.slots[positions])
        start = 0
        for i in positions:
            size, at = int(hits.nbytes[i]), int(hits.offsets[i])
            payload[start : start + size] = reader.data[at : at + size]
            start += size
        same = reader.unchanged(hits.slots[positions], hits.generations[positions])

        kept, start, end = [], 0, 0
        for i, intact in zip(positions, same, strict=True):
            start, end = end, end + int(hits.nbytes[i])
            if not intact:
                nbytes[i], checksums[i] = CHANGED, 0
                continue
            chunk = payload[start:end]
            kept.append(chunk)
            # A checksum the shard noted earlier covers more: also damage since then.
            checksums[i] = checksums[i] or checksum(chunk)
        if len(kept) < len(positions):
            payload = np.concatenate([np.empty(0, np.uint8), *kept])
        return Batch(nbytes, checksums, payload)
