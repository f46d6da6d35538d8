"""The arena as its shard sees it: the only writer of everything but payloads.

A slot goes round: free -> reserved (an owner may write its bytes) -> ready (every process may read
them) -> free. Each step stores in an order that is safe to be watched, and to be killed at:

    reserve    generation odd; owner; state reserved
    publish    no owner; key, bytes, space; state ready; generation even; index
    retire     index; generation odd; ghost; state free

A successor (``adopt``) goes on from there; see ``recovery``.
"""

from __future__ import annotations

import fcntl
import secrets
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena.crews import Crews
from lmkv_ray.arena.format import (
    HEADER,
    HEADER_BYTES,
    PAGE,
    SLOT,
    Geometry,
    Header,
    SlotArray,
    SlotState,
    Tables,
)
from lmkv_ray.arena.numa import place_near_gpus
from lmkv_ray.arena.owners import is_ending, this_process
from lmkv_ray.arena.processor import check_processor
from lmkv_ray.arena.reader import read_header
from lmkv_ray.arena.recovery import ArenaContent, check_extents, repair, scan
from lmkv_ray.arena.segment import DEFAULT_DIRECTORY, Segment
from lmkv_ray.arena.shortage import ShortageError
from lmkv_ray.errors import ArenaError
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import MissReason, Owner


class ArenaHeldError(ArenaError):
    """The process that was an arena's writer is ending, and has not let go of it yet.

    The kernel unmaps the memory of a killed process before it gives back the lock: this takes 0.2
    to 0.3 s a GiB.

    Attributes:
        nbytes: the arena's size in bytes.
    """

    nbytes = 0


class ArenaWriter:
    """A shard's own arena. Made by ``create``, ``adopt`` or ``find_and_adopt``.

    Attributes:
        header: identity and geometry.
        epoch: 1 for the creator, one more for each process that adopted the arena.
        crews: which processes may write into an owner's slots.
    """

    def __init__(self, segment: Segment, header: Header) -> None:
        self.header = header
        self.geometry = header.geometry
        self._segment = segment
        metadata = segment.map(writable=True, nbytes=self.geometry.data_offset)
        self._tables = Tables(metadata, self.geometry)
        self._slots = self._tables.slots
        self.crews = Crews(self._tables.crews)
        self._data = segment.map(writable=True, offset=self.geometry.data_offset)

    @classmethod
    def create(
        cls,
        name: str,
        capacity: int,
        *,
        directory: Path = DEFAULT_DIRECTORY,
        extent_bytes: int | None = None,
    ) -> ArenaWriter:
        """A new, empty arena that a successor will find by ``name`` (a node's id).

        Raises:
            UnsupportedError: see ``check_processor``.
            ArenaError: the directory is unusable or too small, or the sizes make no arena.
        """
        check_processor()
        geometry = Geometry.of(capacity, extent_bytes)
        segment = Segment.create(directory, name, geometry.nbytes)
        try:
            _lock(segment)
            segment.allocate(0, geometry.slots_offset + PAGE)
            header = Header(secrets.randbits(63), time.time_ns(), geometry)
            header.write(segment.map(writable=True, nbytes=HEADER_BYTES))
            writer = cls(segment, header)
            place_near_gpus(writer._data)  # before there are pages
            writer._sign()
        except BaseException:
            segment.close()
            raise
        return writer

    @classmethod
    def adopt(cls, path: str) -> ArenaWriter:
        """Become the writer of an arena whose writer has died; its ready chunks are kept.

        Raises:
            ArenaHeldError: its writer is ending.
            ArenaError: it is not sound, of another version, or its writer lives.
        """
        segment = Segment.open(path)
        try:
            header = read_header(segment)
            _lock(segment)
            writer = cls(segment, header)
            check_extents(writer._tables, segment.path)
            writer._sign()
            repair(writer._tables)
        except BaseException:
            segment.close()
            raise
        return writer

    @classmethod
    def find_and_adopt(
        cls, name: str, capacity: int | None = None, *, directory: Path = DEFAULT_DIRECTORY
    ) -> ArenaWriter | None:
        """Adopt the newest sound arena of this name that any process still maps.

        Args:
            name: as given to ``create``.
            capacity: adopt only an arena of this capacity (the setting may have been changed).
            directory: as given to ``create``.

        Raises:
            ArenaHeldError: there is one, and it can be adopted when its last writer has ended.
            ShortageError: there may be one; look again.
        """
        candidates = []
        for path in Segment.find(name, directory):
            try:
                segment = Segment.open(path)
            except ShortageError:
                raise
            except ArenaError:
                continue
            try:
                header = read_header(segment)
                if capacity in (None, header.geometry.capacity):
                    candidates.append((header.created_ns, path))
            except ArenaError:
                pass
            finally:
                segment.close()
        for _, path in sorted(candidates, reverse=True):
            try:
                return cls.adopt(path)
            except (ArenaHeldError, ShortageError):
                raise
            except ArenaError:
                continue
        return None

    @property
    def path(self) -> str:
        """What others attach to, while this process lives."""
        return self._segment.path

    @property
    def arena_id(self) -> int:
        """Random number of this arena; the same after an adoption."""
        return self.header.arena_id

    @property
    def epoch(self) -> int:
        """1 for the creator, one more for each adoption."""
        return int(self._tables.header["writer_epoch"][0])

    @property
    def cleared(self) -> int:
        """A number that outlives the writer: the last clear that was carried out, in tiers too."""
        return int(self._tables.header["cleared"][0])

    @cleared.setter
    def cleared(self, number: int) -> None:
        self._tables.header["cleared"] = number

    def assign_extent(self, extent: int, slot_bytes: int) -> SlotArray:
        """Cut an extent into slots of ``slot_bytes`` (see ``Geometry.slot_size``), all free.

        The first time this allocates its memory, which takes some 60 ms for 256 MiB (without the
        GIL: a thread may do it). Later it may be cut anew whenever all its slots are free.

        Returns:
            the extent's slots.

        Raises:
            ArenaError: /dev/shm is full (nothing has changed then), or a slot is in use.
        """
        geometry = self.geometry
        if slot_bytes != geometry.slot_size(slot_bytes):
            raise _bug(f"{slot_bytes} is not a slot size")
        old = int(self._tables.slot_bytes[extent])
        if old and self._slots["state"][geometry.slots_of(extent, old)].any():
            raise _bug(f"extent {extent} is in use")
        if not old:
            # All its rows, however it will be cut: peers' network cards may read them.
            nbytes = geometry.slots_per_extent * SLOT.itemsize
            self._segment.allocate(geometry.slots_offset + extent * nbytes, nbytes)
            start = geometry.data_offset + extent * geometry.extent_bytes
            self._segment.allocate(start, geometry.extent_bytes)
        # Of rows that were in no slot a successor knows only that no process should have written
        # there.
        self._slots["state"][geometry.slots_of(extent, geometry.min_slot_bytes)] = SlotState.FREE
        self._tables.slot_bytes[extent] = slot_bytes
        return geometry.slots_of(extent, slot_bytes)

    def reserve(self, slots: SlotArray, owner: Owner) -> None:
        """Let a process write into free slots, and those of its crew."""
        slots = self._expect(slots, SlotState.FREE)
        rows = self._slots
        rows["generation"][slots] |= np.uint64(1)
        rows["owner_pid"][slots] = owner.pid
        rows["owner_start"][slots] = owner.start
        rows["space"][slots] = owner.engine
        rows["pinned"][slots] = False
        rows["state"][slots] = SlotState.RESERVED

    def publish(
        self,
        slots: SlotArray,
        keys: KeyArray,
        nbytes: npt.ArrayLike,
        space: npt.ArrayLike,
        checksums: npt.ArrayLike = 0,
    ) -> None:
        """Make reserved slots readable under their keys.

        The keys should not be in the arena yet; of two slots with one key the later is found.

        Args:
            slots: int64[n].
            keys: uint64[n, 2].
            nbytes: size of each payload; one number or [n].
            space: the first 8 bytes of the namespace; one number or [n].
            checksums: ``format.checksum`` of each payload, where it is known already.
        """
        slots = self._expect(slots, SlotState.RESERVED)
        rows = self._slots
        rows["owner_pid"][slots] = 0  # if we die now, no engine must be waited for
        rows["key"][slots] = keys
        rows["nbytes"][slots] = nbytes
        rows["space"][slots] = np.asarray(space, np.uint64)
        rows["checksum"][slots] = np.asarray(checksums, np.uint64)
        rows["pinned"][slots] = False
        rows["state"][slots] = SlotState.READY
        rows["generation"][slots] += np.uint64(1)
        self._tables.index.insert(keys, slots)

    def retire(self, slots: SlotArray, reason: MissReason) -> None:
        """Take ready slots from all readers; they are free then. Readers learn the reason."""
        slots = self._expect(slots, SlotState.READY)
        rows = self._slots
        keys = rows["key"][slots]
        mine = self._tables.index.lookup(keys) == slots
        self._tables.index.remove(keys[mine])
        rows["generation"][slots] += np.uint64(1)
        self._tables.ghosts.remember(keys, reason)
        rows["state"][slots] = SlotState.FREE

    def free(self, slots: SlotArray) -> None:
        """Take back reserved slots; their owner has given them up or is dead."""
        slots = self._expect(slots, SlotState.RESERVED)
        self._slots["owner_pid"][slots] = 0
        self._slots["state"][slots] = SlotState.FREE

    def set_checksum(self, slot: int, generation: int, checksum: int) -> None:
        """Note the ``format.checksum`` of a payload, unless the slot has changed meanwhile."""
        if self._slots["generation"][slot] == generation:
            self._slots["checksum"][slot] = checksum

    def spoil(self, slots: SlotArray) -> None:
        """Note for a successor that what is being filled in reserved slots must be refused."""
        self._slots["pinned"][self._expect(slots, SlotState.RESERVED)] = True

    def set_pinned(self, slots: SlotArray, pinned: bool) -> None:
        """Note for a successor whether the chunks in these slots are pinned."""
        self._slots["pinned"][slots] = pinned

    def payload(self, slot: int) -> npt.NDArray[np.uint8]:
        """Writable view of all bytes of a slot."""
        exists, offsets, size = self._tables.locate(np.array([slot]))
        if not exists[0]:
            raise _bug(f"slot {slot} is not in an assigned extent")
        return self._data[offsets[0] : offsets[0] + size[0]]

    def offset_of(self, payload: npt.NDArray[np.uint8]) -> int:
        """Where in the data a view begins that ``payload`` gave."""
        return payload.ctypes.data - self._data.ctypes.data

    def scan(self) -> ArenaContent:
        """All that is in the arena; for a shard that has just adopted it."""
        return scan(self._tables)

    def close(self) -> None:
        """Stop being the writer. The memory goes with the last process that maps it."""
        if self._segment.fd >= 0:
            fcntl.flock(self._segment.fd, fcntl.LOCK_UN)
            self._segment.close()

    def _sign(self) -> None:
        me = this_process()
        self._tables.header["writer_pid"] = me.pid
        self._tables.header["writer_start"] = me.start
        self._tables.header["writer_epoch"] += np.uint64(1)

    def _expect(self, slots: SlotArray, state: SlotState) -> SlotArray:
        """The slots as an array.

        Raises:
            ArenaError: one of them is in another state, or none that the arena has.
        """
        slots = np.asarray(slots, np.int64)
        if not self._tables.locate(slots)[0].all():
            raise _bug(f"slots {slots.tolist()[:8]} are not all in assigned extents")
        if (self._slots["state"][slots] != state).any():
            raise _bug(f"slots {slots.tolist()[:8]} are not all {state.name.lower()}")
        return slots


def _bug(what: str) -> ArenaError:
    return ArenaError(
        f"The arena was used wrongly: {what}.", next_step="report this with the shard's log."
    )


def _lock(segment: Segment) -> None:
    """Let the kernel see to it that there is one writer: the lock goes with its process."""
    try:
        fcntl.flock(segment.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        row = np.frombuffer(segment.map(writable=False, nbytes=HEADER_BYTES), HEADER, 1)
        pid, start = int(row["writer_pid"][0]), int(row["writer_start"][0])
        if is_ending(Owner(pid=pid, start=start)):
            held = ArenaHeldError(
                f"The arena {segment.path} has a writer, process {pid}, that is ending.",
                next_step="wait; its memory is being unmapped.",
            )
            held.nbytes = segment.nbytes
            raise held from error
        raise ArenaError(
            f"The arena {segment.path} has a living writer.",
            next_step="wait until the shard that owns it has ended.",
        ) from error
