"""A reader that may only copy bytes out of another process's memory finds what a reader that maps
the arena finds, as far as checksums are noted.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.arena import (
    ROWS_BYTES,
    SLOT,
    TAGS_BYTES,
    ArenaReader,
    ArenaWriter,
    DistantArena,
    checksum,
    this_process,
)
from lmkv_ray.index import LANES, key_tags
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import MissReason

SIZES = (16 << 10, 64 << 10)
NBYTES = 10_000
KEYS = np.random.default_rng(0).integers(0, 2**64, (64, 2), dtype=np.uint64)


@pytest.fixture(scope="module")
def writer() -> Iterator[ArenaWriter]:
    writer = ArenaWriter.create(f"test{secrets.token_hex(4)}", 4 << 20)
    yield writer
    writer.close()


@pytest.fixture(scope="module")
def reader(writer: ArenaWriter) -> Iterator[ArenaReader]:
    reader = ArenaReader.attach(writer.path)
    yield reader
    reader.close()


class Memory:
    """Copies bytes from addresses, as a network card would."""

    def __init__(self, reader: ArenaReader) -> None:
        self.parts = [reader.data, reader.map_tables()]

    def read(self, addresses: np.ndarray, nbytes: int) -> np.ndarray:
        return np.array([self._one(int(address), nbytes) for address in addresses], np.uint8)

    def _one(self, address: int, nbytes: int) -> np.ndarray:
        for part in self.parts:
            offset = address - part.ctypes.data
            if 0 <= offset <= part.nbytes - nbytes:
                return part[offset : offset + nbytes]
        raise AssertionError("an address outside of what is registered")


def distant(reader: ArenaReader, memory: Memory, hidden: int = -1) -> DistantArena:
    """As a peer knows it; one extent may be unknown to it."""
    geometry = reader.geometry
    sizes = reader.slot_bytes
    if hidden >= 0:
        sizes[hidden] = 0
    data, tables = (part.ctypes.data for part in memory.parts)
    slots = tables + geometry.slots_offset - geometry.index_offset
    return DistantArena(geometry, sizes, tables, slots, data)


def find(arena: DistantArena, memory: Memory, keys: KeyArray) -> dict[int, np.ndarray]:
    """Two readings: the chunks that are said to be there, by position."""
    tags, rows = arena.buckets(keys)
    slots = arena.slots_of(
        keys,
        memory.read(tags, TAGS_BYTES).view(np.uint64).reshape(-1, LANES),
        memory.read(rows, ROWS_BYTES).view(np.uint32).reshape(-1, LANES),
    )
    read = np.zeros(len(keys), SLOT)
    named = slots >= 0
    read[named] = memory.read(arena.rows(slots[named]), SLOT.itemsize).view(SLOT).ravel()
    offsets, sizes = arena.places(slots)
    places = {
        i: memory.read(arena.data + offsets[i : i + 1], int(sizes[i]))[0]
        for i in np.flatnonzero(named).tolist()
    }
    there = arena.holds(keys, slots, read)
    found = {}
    for i in np.flatnonzero(there).tolist():
        nbytes = int(read["nbytes"][i])
        found[i] = places[i][:nbytes]
        assert checksum(np.ascontiguousarray(found[i])) == read["checksum"][i]
    return found


@given(st.data())
def test_it_finds_what_is_there_and_has_a_checksum(
    writer: ArenaWriter, reader: ArenaReader, data: st.DataObject
) -> None:
    size = data.draw(st.sampled_from(SIZES))
    extents = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))
    slots = np.concatenate([writer.assign_extent(extent, size) for extent in extents])
    slots = slots[: data.draw(st.integers(1, len(slots)))][:40]
    kinds = data.draw(
        st.lists(st.sampled_from("cna"), min_size=len(slots), max_size=len(slots))
    )  # with a checksum, without, gone again
    writer.reserve(slots, this_process())
    for i, slot in enumerate(slots.tolist()):
        writer.payload(slot)[:NBYTES] = i
    sums = [checksum(writer.payload(slot)[:NBYTES]) for slot in slots.tolist()]
    noted = [value if kind != "n" else 0 for value, kind in zip(sums, kinds, strict=True)]
    writer.publish(slots, KEYS[: len(slots)], NBYTES, 1, noted)
    gone = slots[[kind == "a" for kind in kinds]]
    writer.retire(gone, MissReason.EVICTED)
    memory = Memory(reader)
    try:
        found = find(distant(reader, memory), memory, KEYS)
        assert set(found) == {i for i, kind in enumerate(kinds) if kind == "c"}
        assert all((content == i).all() for i, content in found.items())
        seen = find(distant(reader, memory, hidden=extents[0]), memory, KEYS)
        ours = reader.lookup(KEYS).offsets // reader.extent_bytes
        assert set(seen) == {i for i in found if ours[i] != extents[0]}
    finally:
        writer.retire(slots[[kind != "a" for kind in kinds]], MissReason.CLEARED)


def test_rows_that_lie_are_not_followed(writer: ArenaWriter, reader: ArenaReader) -> None:
    """Whatever the peer's memory says, reads stay in its arena and within a slot."""
    slots = writer.assign_extent(0, SIZES[0])[:8]
    memory = Memory(reader)
    arena = distant(reader, memory)
    rows = np.zeros(8, SLOT)
    rows["key"], rows["generation"], rows["checksum"] = KEYS[:8], 2, 1
    rows["nbytes"] = [1, SIZES[0], SIZES[0] + 1, 0, -1, 1, 1, 1]
    rows["generation"][5] = 3
    rows["checksum"][6] = 0
    rows["key"][7] = 0
    assert arena.holds(KEYS[:8], slots, rows).tolist() == [True, True] + [False] * 6
    offsets, sizes = arena.places(slots)
    assert offsets.tolist() == [i * SIZES[0] for i in range(8)]
    assert set(sizes.tolist()) == {SIZES[0]}
    tags, lanes = np.zeros((2, LANES), np.uint64), np.full((2, LANES), 2**32 - 1, np.uint32)
    tags[:, 3] = key_tags(KEYS[:2])
    assert arena.slots_of(KEYS[:2], tags, lanes).tolist() == [-1, -1]
