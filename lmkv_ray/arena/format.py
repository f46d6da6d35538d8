"""What the bytes of an arena file mean: header, tables, slot grid.

    header   extent table   crews   ghosts   index   slot table (sparse)   data (sparse)

Everything up to the index, and slot row 0, is allocated when the file is created; pages of the slot
table and of the data are allocated together when their extent is assigned to a slot size, and never
given back. So no process may touch any other slot row or payload byte of an extent whose
``slot_bytes`` is zero: on a full tmpfs that page could not be had, and the process would die of
SIGBUS.

Slots are a fixed grid: slot ``extent * slots_per_extent + i`` has row ``slot`` of the slot table
and the bytes from ``extent * extent_bytes + i * slot_bytes`` of the data, where ``slot_bytes`` is
the extent's. Numbers are native-endian; the file never leaves its host.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from lmkv_ray.arena.crews import CREW, ROWS
from lmkv_ray.arena.ghosts import GhostTable
from lmkv_ray.errors import ArenaError, ChunkSizeError
from lmkv_ray.index import BucketIndex, Buffer

MAGIC = int.from_bytes(b"lmkvaren", "little")
VERSION = 4
PAGE = 4096
HEADER_BYTES = PAGE
MIN_CAPACITY = 4 << 20
MIN_SLOT_BYTES = 16 << 10
MAX_SLOTS = 1 << 20
"""Bounds the tables (index 50 MiB, slot rows 64 MiB) however large the arena is."""
DATA_ALIGNMENT = 2 << 20
EXTENTS = 16
"""At least so many extents an arena has, if its capacity allows: as many chunks of any size fit."""
EXTENT_BYTES = (1 << 20, 256 << 20)
"""The smallest and the largest extent that is made without being asked for."""


SlotArray = npt.NDArray[np.int64]


class SlotState(enum.IntEnum):
    """What a slot is to the shard; readers look at its generation only."""

    FREE = 0
    RESERVED = 1
    READY = 2


HEADER = np.dtype(
    [
        # Never changed after creation, and covered by the checksum.
        ("magic", "u8"),
        ("version", "u8"),
        ("arena_id", "u8"),
        ("created_ns", "u8"),
        ("capacity", "u8"),
        ("extent_bytes", "u8"),
        ("min_slot_bytes", "u8"),
        ("nbytes", "u8"),
        ("checksum", "u8"),
        # The present writer. There is no boot id: a file without a name does not survive a boot.
        ("writer_epoch", "u8"),
        ("writer_pid", "u8"),
        ("writer_start", "u8"),
        # The last clear of the whole cache that was carried out here.
        ("cleared", "u8"),
    ]
)
_SEALED_BYTES = HEADER.fields["checksum"][1]  # type: ignore[index]

SLOT = np.dtype(
    [
        ("key", "u8", 2),
        ("generation", "u8"),  # even: may be read; odd: may not; 0: never used, may not be read
        ("checksum", "u8"),  # xxh3_64 of the payload; 0: not computed yet
        ("space", "u8"),  # of a reserved slot: which engine of its owner has it
        ("owner_start", "u8"),
        ("nbytes", "i8"),
        ("owner_pid", "u4"),
        ("state", "u2"),
        # Of a ready slot: a successor must not evict it either. Of a reserved one: a clear came
        # while it was being filled, so a successor must refuse it too.
        ("pinned", "u2"),
    ]
)
assert SLOT.itemsize == 64, "a slot row is one cache line"

EXTENT = np.dtype([("slot_bytes", "i8")])


@dataclass(frozen=True)
class Geometry:
    """Where everything is in an arena file. All numbers are bytes unless they count something."""

    capacity: int
    """Bytes for payloads, as asked for; a last part that makes no whole extent is not used."""
    extent_bytes: int
    min_slot_bytes: int
    extents: int
    slots_per_extent: int
    """Rows per extent in the slot grid, enough for slots of ``min_slot_bytes``."""
    ghosts: int
    """Entries of the ghost table."""
    crews_offset: int
    ghosts_offset: int
    index_offset: int
    slots_offset: int
    data_offset: int
    nbytes: int
    """Size of the file."""

    @classmethod
    def of(cls, capacity: int, extent_bytes: int | None = None) -> Geometry:
        """The geometry for a capacity: a pure function, so that files need to store little.

        Args:
            capacity: at least 4 MiB.
            extent_bytes: a multiple of 4 KiB, and the largest slot there can be. Default: a 16th of
                the capacity, within 1 MiB and 256 MiB.

        Raises:
            ArenaError: capacity or extent size make no arena.
        """
        if capacity < MIN_CAPACITY:
            raise ArenaError(
                f"An arena of {capacity} bytes is too small.",
                next_step=f"set LMKV_CAPACITY to at least {MIN_CAPACITY >> 20} MiB.",
            )
        if extent_bytes is None:
            least, most = EXTENT_BYTES
            extent_bytes = min(max(capacity // EXTENTS, least), most) // PAGE * PAGE
        min_slot_bytes = MIN_SLOT_BYTES
        while capacity // min_slot_bytes > MAX_SLOTS:
            min_slot_bytes *= 2
        if not min_slot_bytes <= extent_bytes <= capacity or extent_bytes % PAGE:
            raise ArenaError(
                f"Extents of {extent_bytes} bytes do not fit an arena of {capacity} bytes.",
                next_step=f"choose a multiple of {PAGE} from {min_slot_bytes} to {capacity} bytes.",
            )
        extents = capacity // extent_bytes
        slots_per_extent = extent_bytes // min_slot_bytes
        slots = extents * slots_per_extent
        ghosts = GhostTable.entries_for(slots)
        crews_offset = HEADER_BYTES + _round_up(extents * EXTENT.itemsize, PAGE)
        ghosts_offset = crews_offset + _round_up(ROWS * CREW.itemsize, PAGE)
        index_offset = ghosts_offset + _round_up(ghosts * 8, PAGE)
        slots_offset = index_offset + _round_up(BucketIndex.nbytes(slots), PAGE)
        data_offset = slots_offset + _round_up(slots * SLOT.itemsize, DATA_ALIGNMENT)
        data_offset = _round_up(data_offset, DATA_ALIGNMENT)
        return cls(
            capacity=capacity,
            extent_bytes=extent_bytes,
            min_slot_bytes=min_slot_bytes,
            extents=extents,
            slots_per_extent=slots_per_extent,
            ghosts=ghosts,
            crews_offset=crews_offset,
            ghosts_offset=ghosts_offset,
            index_offset=index_offset,
            slots_offset=slots_offset,
            data_offset=data_offset,
            nbytes=data_offset + extents * extent_bytes,
        )

    @property
    def slots(self) -> int:
        """Rows of the slot table."""
        return self.extents * self.slots_per_extent

    def slot_size(self, nbytes: int) -> int:
        """The slot size for chunks of ``nbytes``: a multiple of 4 KiB.

        Raises:
            ChunkSizeError: no extent holds a chunk of this size; says what capacity would.
        """
        size = max(_round_up(nbytes, PAGE), self.min_slot_bytes)
        if not 0 < nbytes <= size <= self.extent_bytes:
            needed = (
                f"set LMKV_CAPACITY to at least {-(-size * EXTENTS >> 20)}MiB on this node, or "
            )
            raise ChunkSizeError(
                f"A chunk of {nbytes} bytes does not fit an arena of {self.capacity} bytes, whose "
                f"chunks have at most {self.extent_bytes} bytes.",
                next_step=f"{needed if size <= EXTENT_BYTES[1] else ''}"
                "make chunks smaller (LMKV_CHUNK_TOKENS of the engine), and restart.",
            )
        return size

    def slots_of(self, extent: int, slot_bytes: int) -> npt.NDArray[np.int64]:
        """Ids of the slots of an extent that is cut into slots of ``slot_bytes``."""
        first = extent * self.slots_per_extent
        return np.arange(first, first + self.extent_bytes // slot_bytes, dtype=np.int64)


@dataclass(frozen=True)
class Header:
    """The part of the header that never changes."""

    arena_id: int
    """Random, below 2**63."""
    created_ns: int
    """Wall-clock nanoseconds."""
    geometry: Geometry

    def write(self, buffer: Buffer) -> None:
        """Write into the first page of a writable mapping; the magic number comes last."""
        row = np.frombuffer(buffer, HEADER, 1)
        geometry = self.geometry
        row["version"] = VERSION
        row["arena_id"] = self.arena_id
        row["created_ns"] = self.created_ns
        row["capacity"] = geometry.capacity
        row["extent_bytes"] = geometry.extent_bytes
        row["min_slot_bytes"] = geometry.min_slot_bytes
        row["nbytes"] = geometry.nbytes
        row["magic"] = MAGIC
        row["checksum"] = _seal(row)

    @classmethod
    def read(cls, buffer: Buffer, path: str, file_bytes: int) -> Header:
        """The header of a mapped file, if it is sound.

        Raises:
            ArenaError: it is not an arena, of another version, damaged, or truncated.
        """
        row = np.frombuffer(buffer, HEADER, 1).copy()
        if row["magic"] != MAGIC:
            raise ArenaError(f"{path} is not an arena of lmkv_ray.", next_step=_RESTART)
        if row["version"] != VERSION:
            raise ArenaError(
                f"{path} is an arena of format {row['version'].item()}; this is format {VERSION}.",
                next_step="run one version of lmkv_ray in all processes of a node.",
            )
        if row["checksum"] != _seal(row):
            raise ArenaError(f"The header of {path} is damaged.", next_step=_RESTART)
        geometry = Geometry.of(row["capacity"].item(), row["extent_bytes"].item())
        if geometry.nbytes != row["nbytes"] or file_bytes != geometry.nbytes:
            raise ArenaError(
                f"{path} has {file_bytes} bytes; its header says {row['nbytes'].item()}.",
                next_step=_RESTART,
            )
        return cls(row["arena_id"].item(), row["created_ns"].item(), geometry)


_RESTART = "run lmkv stop; the next engine that starts also starts the cache, with a new arena."


def _seal(row: npt.NDArray[np.void]) -> int:
    return xxhash.xxh3_64_intdigest(row.tobytes()[:_SEALED_BYTES])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Tables:
    """Views of an arena's tables over a mapping of (at least) everything before the data.

    Attributes:
        header: HEADER[1].
        slot_bytes: int64[extents], 0 where an extent is not assigned.
        crews: CREW[ROWS].
        slots: SLOT[slots]; touch only rows of assigned extents.
        index: keys to slots.
        ghosts: removed keys to reasons.
    """

    def __init__(self, buffer: Buffer, geometry: Geometry) -> None:
        whole = np.frombuffer(buffer, np.uint8)
        self.geometry = g = geometry
        self.header = np.frombuffer(buffer, HEADER, 1)
        self.slot_bytes = np.frombuffer(buffer, EXTENT, g.extents, HEADER_BYTES)["slot_bytes"]
        self.crews = np.frombuffer(buffer, CREW, ROWS, g.crews_offset)
        self.slots = np.frombuffer(buffer, SLOT, g.slots, g.slots_offset)
        self.index = BucketIndex(whole[g.index_offset : g.slots_offset], g.slots)
        self.ghosts = GhostTable(whole[g.ghosts_offset : g.index_offset], g.ghosts)

    def locate(
        self, slots: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See the function ``locate``."""
        return locate(self.geometry, self.slot_bytes, slots)


def locate(
    geometry: Geometry, slot_bytes: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For any numbers: is it a slot of an assigned extent, its offset in the data, its size.

    Offset and size mean nothing where it is not.

    Args:
        geometry: where the arena's tables and slots lie.
        slot_bytes: of each extent, 0 where it is not assigned.
        slots: int64[n].
    """
    exists = (slots >= 0) & (slots < geometry.slots)
    rows = slots * exists
    extents = rows // geometry.slots_per_extent
    positions = rows - extents * geometry.slots_per_extent
    size = slot_bytes[extents]
    ends = (positions + 1) * size
    exists &= (size > 0) & (ends <= geometry.extent_bytes)
    return exists, extents * geometry.extent_bytes + ends - size, size


def is_readable(generations: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which generations allow reading: even, and used at all."""
    readable: npt.NDArray[np.bool_] = (generations > 0) & (generations & np.uint64(1) == 0)
    return readable


def checksum(payload: npt.NDArray[np.uint8]) -> int:
    """xxh3_64 of a payload; never 0, which means "not computed"."""
    return xxhash.xxh3_64_intdigest(payload.data) or 1
