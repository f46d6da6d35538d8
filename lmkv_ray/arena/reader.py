"""The arena as engines and peers see it: lock-free lookups and validated copies.

A reader looks keys up, copies bytes out, and then asks ``unchanged``. The shard makes a slot's
generation odd *before* a writer may overwrite the slot, so a copy whose generation is still the one
of the lookup is intact; any other copy is thrown away. There is nothing to lock, or to leak.

What a copy rests on is read after the generation, also where the slot lies: an extent without
chunks may be cut anew (``tests/arena/test_interleavings.py`` tries all orders).

On x86 loads are not reordered with loads, nor stores with stores, so the order in the program is
the order that others see. On ARM it is the message that grants a slot to its next owner, between
the generation and the overwrite, that orders the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena.format import HEADER_BYTES, Header, Tables, checksum, is_readable
from lmkv_ray.arena.processor import check_processor
from lmkv_ray.arena.segment import Segment, populate
from lmkv_ray.errors import ArenaError
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import MissReason, Owner

_POPULATE_STEP = 64 << 20

Summed = tuple[int, int, int]
"""Slot, generation, and the checksum of what it held then."""


@dataclass(frozen=True)
class Hits:
    """What a lookup found, one element a key.

    The bytes of hit ``i`` are ``reader.data[offsets[i] : offsets[i] + nbytes[i]]``. Reading
    this memory is always safe (it stays mapped); the copied bytes are valid only if
    ``unchanged(slots, generations)`` is true afterwards.
    """

    slots: npt.NDArray[np.int64]
    """-1 where the key is missing; the other fields are 0 there."""
    generations: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def found(self) -> npt.NDArray[np.bool_]:
        """bool[n]: which keys were found."""
        return self.slots >= 0

    @property
    def run(self) -> int:
        """How many of the first keys were found without a gap."""
        missing = np.flatnonzero(self.slots < 0)
        return int(missing[0]) if len(missing) else len(self.slots)

    def of_size(self, nbytes: int) -> Hits:
        """Those of ``nbytes``; a reader that knows this size does not take others.

        What is shorter came from a stranger who may write a tier or speak as a peer. Behind it the
        slot has the bytes of a chunk that was there before, maybe of another tenant.
        """
        right = self.nbytes == nbytes
        return Hits(
            slots=np.where(right, self.slots, -1),
            generations=self.generations * right,
            offsets=self.offsets * right,
            nbytes=self.nbytes * right,
        )


class ArenaReader:
    """An attached arena. Metadata is mapped read-only, so that no bug of a reader can damage it.

    Attributes:
        header: identity and geometry.
        data: uint8, the data area, writable: engines fill the slots they were granted.
    """

    def __init__(self, segment: Segment, header: Header) -> None:
        self.header = header
        geometry = self.geometry = header.geometry
        self._segment = segment
        metadata = segment.map(writable=False, nbytes=geometry.data_offset)
        self.data = segment.map(writable=True, offset=geometry.data_offset)
        self._tables = tables = Tables(metadata, geometry)
        # Columns as strided views: gathering from them is faster than from whole rows.
        self._keys = tables.slots["key"]
        self._generations = tables.slots["generation"]
        self._nbytes = tables.slots["nbytes"]
        self._checksums = tables.slots["checksum"]
        self._populated = np.zeros(len(self._tables.slot_bytes), np.bool_)

    @classmethod
    def attach(cls, path: str, arena_id: int | None = None) -> ArenaReader:
        """Map the arena at ``path`` (what ``Welcome.arena_path`` or ``ArenaWriter.path`` says).

        Args:
            path: ``/proc/<pid>/fd/<n>`` of a process that holds it.
            arena_id: the arena that is expected; None: any.

        Raises:
            UnsupportedError: see ``check_processor``.
            ArenaError: it cannot be opened, is not sound, or is another arena.
        """
        check_processor()
        segment = Segment.open(path)
        try:
            header = read_header(segment)
            if arena_id not in (None, header.arena_id):
                raise ArenaError(
                    f"{path} is another arena than the one expected.",
                    next_step="ask the shard for its arena again; it was restarted.",
                )
            return cls(segment, header)
        except BaseException:
            segment.close()
            raise

    @property
    def arena_id(self) -> int:
        """Random number of this arena."""
        return self.header.arena_id

    @property
    def writer(self) -> Owner:
        """The process that is the arena's writer, or was its last one."""
        header = self._tables.header
        return Owner(pid=int(header["writer_pid"][0]), start=int(header["writer_start"][0]))

    @property
    def extent_bytes(self) -> int:
        """Size of an extent; no slot crosses a multiple of it in ``data``."""
        return self.geometry.extent_bytes

    def lookup(self, keys: KeyArray) -> Hits:
        """Find keys (n, 2): no RPC, no lock, no system call."""
        slots = self._tables.index.lookup(keys)
        known, _, _ = self._tables.locate(slots)
        # Row 0 may always be touched; a row of an extent that is not assigned may not.
        rows = slots * known
        # The generation before all that it vouches for: also before the size of the extent's slots,
        # which gives the offset, as an empty extent may be cut anew.
        generations = self._generations[rows]
        known &= is_readable(generations)
        same = self._keys[rows] == keys
        known &= same[:, 0] & same[:, 1]
        nbytes = self._nbytes[rows]
        exists, offsets, size = self._tables.locate(rows)
        known &= exists & (nbytes <= size)
        return Hits(
            slots=np.where(known, slots, -1),
            generations=generations * known,
            offsets=offsets * known,
            nbytes=nbytes * known,
        )

    def unchanged(
        self, slots: npt.NDArray[np.int64], generations: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.bool_]:
        """bool[n]: what was copied from these slots since their lookup is intact.

        Only for slots that were found; ask when the copy is complete (for a GPU: its event).
        """
        same: npt.NDArray[np.bool_] = self._generations[slots] == generations
        return same

    def offsets(self, slots: npt.NDArray[np.int64], nbytes: int) -> npt.NDArray[np.int64]:
        """Where the bytes of slots begin in ``data``, int64[n].

        Args:
            slots: that were granted; or that were found, and then ``unchanged`` has the last word.
            nbytes: that are to be copied from or to the beginning of each slot.

        Raises:
            ArenaError: there is no such slot of that size.
        """
        exists, offsets, size = self._tables.locate(np.asarray(slots, np.int64))
        if not (exists & (size >= nbytes)).all():
            raise ArenaError(
                f"The arena does not have all of the slots {slots.tolist()[:8]} ... of {nbytes} "
                "bytes any more.",
                next_step="nothing, if a full arena serves several models: their slots change. "
                "Report it if it was a save: those slots were granted.",
            )
        return offsets

    def payload(self, slot: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Writable view of the first bytes of a slot.

        Raises:
            ArenaError: there is no such slot of that size.
        """
        offset = int(self.offsets(np.array([slot]), nbytes)[0])
        return self.data[offset : offset + nbytes]

    def checksums(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """xxh3_64 of slots that were found, 0 where it was not noted; uint64[n]."""
        checksums: npt.NDArray[np.uint64] = self._checksums[slots]
        return checksums

    def summed(self, hits: Hits) -> tuple[npt.NDArray[np.uint64], list[Summed]]:
        """xxh3_64 of all hits, uint64[n] (0 where there is none); computed where it was not noted.

        A noted one covers more: also damage since then. Takes 0.1 ms a MiB and releases the GIL.

        Returns:
            the checksums, and those that ``ArenaWriter.set_checksum`` may note.
        """
        checksums = np.zeros(len(hits), np.uint64)
        found = hits.found
        checksums[found] = self._checksums[hits.slots[found]]
        new = np.flatnonzero(found & (checksums == 0))
        for i in new.tolist():
            start, nbytes = int(hits.offsets[i]), int(hits.nbytes[i])
            checksums[i] = checksum(self.data[start : start + nbytes])
        new = new[self.unchanged(hits.slots[new], hits.generations[new])]
        rows = (hits.slots[new], hits.generations[new], checksums[new])
        return checksums, list(zip(*(row.tolist() for row in rows), strict=True))

    @property
    def slot_bytes(self) -> npt.NDArray[np.int64]:
        """Size of the slots of each extent, int64[extents]; 0 where it is not assigned. A copy."""
        return self._tables.slot_bytes.copy()

    def reasons(self, keys: KeyArray) -> list[MissReason]:
        """Why missed keys are not here: ``EVICTED``, ``CLEARED`` or ``NEVER_STORED``."""
        return self._tables.ghosts.reasons(keys)

    def assigned(self) -> list[tuple[int, int]]:
        """Parts (offset, nbytes) of ``data`` that have memory; neighbours are joined."""
        return join_extents(self._tables.slot_bytes, self.geometry.extent_bytes)

    @property
    def grown(self) -> bool:
        """Whether extents were assigned that this reader has not faulted in."""
        return bool(((self._tables.slot_bytes > 0) & ~self._populated).any())

    def populate(self) -> Iterator[int]:
        """Fault in newly assigned memory, 64 MiB a step, so that the first copies need not.

        Best run in a thread, beside other work (the GIL is released).

        Yields:
            bytes done by a step.
        """
        new = (self._tables.slot_bytes > 0) & ~self._populated
        self._populated |= new
        for offset, nbytes in join_extents(new.astype(np.int64), self.geometry.extent_bytes):
            for start in range(offset, offset + nbytes, _POPULATE_STEP):
                part = self.data[start : min(start + _POPULATE_STEP, offset + nbytes)]
                populate(part, writable=True)
                yield part.nbytes

    def close(self) -> None:
        """Detach. Views of ``data`` stay valid; the memory goes with the last of them."""
        self._segment.close()


def read_header(segment: Segment) -> Header:
    """The header of a segment.

    Raises:
        ArenaError: it is not a sound arena of this version.
    """
    if segment.nbytes < HEADER_BYTES:
        raise ArenaError(
            f"{segment.path} is too small to be an arena.",
            next_step="ask the shard for its arena again; it was restarted.",
        )
    return Header.read(
        segment.map(writable=False, nbytes=HEADER_BYTES), segment.path, segment.nbytes
    )


def join_extents(slot_bytes: npt.NDArray[np.int64], extent_bytes: int) -> list[tuple[int, int]]:
    """Ranges (offset, nbytes) of the extents that are assigned; neighbours are one range."""
    assigned = np.concatenate([[0], slot_bytes > 0, [0]])
    edges = np.flatnonzero(np.diff(assigned)).reshape(-1, 2)
    return [(int(a) * extent_bytes, int(b - a) * extent_bytes) for a, b in edges]
