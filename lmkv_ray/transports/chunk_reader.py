"""The peer's side of a fetch: chunks out of an arena, validated and with checksums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaReader
from lmkv_ray.keys import KeyArray

BATCH_BYTES = 32 << 20
"""Payload of one batch: large enough for full speed, small enough to be held several times."""
MISSING = -1
CHANGED = -2


@dataclass(frozen=True)
class ChunkBatch:
    """Chunks on their way to another node."""

    nbytes: npt.NDArray[np.int64]
    """For each key asked for: the size of its chunk, or ``MISSING`` or ``CHANGED``."""
    checksums: npt.NDArray[np.uint64]
    """For each key asked for: what ``arena.checksum`` of its chunk must be, or 0."""
    chunks: list[npt.NDArray[np.uint8]]
    """Those that are there. Before they are sent they are views of the arena, so that sending is
    the only copy: bytes that have not their checksum on arrival were replaced meanwhile."""


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

    def read(self, keys: KeyArray) -> ChunkBatch:
        """What is there of ``keys``. Call it in a thread: it may compute checksums."""
        reader = self._reader
        hits = reader.lookup(keys)
        wanted = hits.nbytes * hits.found
        ends = np.cumsum(wanted)
        sent = hits.found & ((ends <= self._limit) | (ends == wanted))
        nbytes = np.where(sent, hits.nbytes, MISSING)
        unsent = np.flatnonzero(hits.found & ~sent)
        hits.slots[unsent] = -1
        checksums, _ = reader.summed(hits)
        positions = np.flatnonzero(sent)
        slots = hits.slots[positions]
        starts = hits.offsets[positions].tolist()
        sizes = nbytes[positions].tolist()
        chunks = [reader.data[at : at + size] for at, size in zip(starts, sizes, strict=True)]
        same = reader.unchanged(slots, hits.generations[positions])
        gone = positions[~same]
        nbytes[gone], checksums[gone] = CHANGED, 0
        kept = [chunk for chunk, intact in zip(chunks, same.tolist(), strict=True) if intact]
        return ChunkBatch(nbytes, checksums, kept)
