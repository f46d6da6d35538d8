"""Geometry is sound for every capacity; headers that are not are refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.arena import Geometry
from lmkv_ray.arena.format import (
    DATA_ALIGNMENT,
    HEADER,
    MAX_SLOTS,
    MIN_CAPACITY,
    PAGE,
    VERSION,
    Header,
)
from lmkv_ray.errors import ArenaError, ChunkSizeError

GIB = 1 << 30


@given(st.integers(MIN_CAPACITY, 4096 * GIB))
def test_areas_follow_each_other(capacity: int) -> None:
    g = Geometry.of(capacity)
    starts = [PAGE, g.ghosts_offset, g.index_offset, g.slots_offset, g.data_offset, g.nbytes]
    assert starts == sorted(starts)
    assert all(start % PAGE == 0 for start in starts)
    assert g.data_offset % DATA_ALIGNMENT == 0
    assert g.slots <= MAX_SLOTS
    assert 0 <= capacity - g.extents * g.extent_bytes < g.extent_bytes
    assert g.extents >= 4


@given(st.integers(MIN_CAPACITY, 64 * GIB), st.data())
def test_the_capacity_that_is_named_is_enough(capacity: int, data: st.DataObject) -> None:
    """Whatever fits no arena of one capacity fits one of the capacity that the refusal names."""
    nbytes = data.draw(st.integers(1, 256 << 20))
    try:
        Geometry.of(capacity).slot_size(nbytes)
    except ChunkSizeError as error:
        (named,) = re.findall(r"at least (\d+)MiB", str(error))
        assert Geometry.of(int(named) << 20).slot_size(nbytes) >= nbytes


def test_a_chunk_of_2_9_mb_fits_64_mib() -> None:
    assert len(Geometry.of(64 << 20).slots_of(0, Geometry.of(64 << 20).slot_size(2_900_000))) == 1


@given(st.integers(MIN_CAPACITY, 64 * GIB), st.data())
def test_slots_lie_inside_their_extent(capacity: int, data: st.DataObject) -> None:
    g = Geometry.of(capacity)
    nbytes = data.draw(st.integers(1, g.extent_bytes))
    extent = data.draw(st.integers(0, g.extents - 1))
    size = g.slot_size(nbytes)
    assert size >= nbytes
    assert size % PAGE == 0
    assert g.slot_size(size) == size
    slots = g.slots_of(extent, size)
    assert 1 <= len(slots) <= g.slots_per_extent
    assert len(slots) * size <= g.extent_bytes
    assert (slots // g.slots_per_extent == extent).all()


def test_defaults() -> None:
    assert Geometry.of(64 * GIB).extent_bytes == 256 << 20
    assert Geometry.of(4 << 20).extent_bytes == 1 << 20
    metadata = Geometry.of(1024 * GIB).data_offset
    assert metadata < 200 << 20, "tables stay small however large the arena is"


@pytest.mark.parametrize(
    ("capacity", "extent_bytes"),
    [(1 << 20, None), (4 << 20, 5000), (4 << 20, 4096), (4 << 20, 8 << 20)],
)
def test_impossible_sizes_are_refused(capacity: int, extent_bytes: int | None) -> None:
    with pytest.raises(ArenaError, match="Next step"):
        Geometry.of(capacity, extent_bytes)


@pytest.mark.parametrize("nbytes", [0, -1, (1 << 20) + 1])
def test_impossible_chunks_are_refused(nbytes: int) -> None:
    with pytest.raises(ArenaError, match="does not fit"):
        Geometry.of(4 << 20).slot_size(nbytes)


def sound_header() -> tuple[bytearray, Header]:
    header = Header(arena_id=5, created_ns=6, geometry=Geometry.of(4 << 20))
    buffer = bytearray(PAGE)
    header.write(buffer)
    return buffer, header


def test_a_header_is_read_back() -> None:
    buffer, header = sound_header()
    assert Header.read(buffer, "x", header.geometry.nbytes) == header


SEALED_BYTES = HEADER.fields["checksum"][1] + 8  # type: ignore[index]


@given(st.integers(0, SEALED_BYTES - 1), st.integers(1, 255))
def test_every_damaged_byte_is_noticed(position: int, flip: int) -> None:
    buffer, header = sound_header()
    buffer[position] ^= flip
    with pytest.raises(ArenaError):
        Header.read(buffer, "x", header.geometry.nbytes)


def test_another_version_is_named() -> None:
    buffer, header = sound_header()
    np.frombuffer(buffer, HEADER, 1)["version"] = VERSION + 1
    with pytest.raises(ArenaError, match=f"format {VERSION + 1}; this is format {VERSION}"):
        Header.read(buffer, "x", header.geometry.nbytes)


def test_a_truncated_file_is_refused() -> None:
    buffer, header = sound_header()
    with pytest.raises(ArenaError, match="its header says"):
        Header.read(buffer, "x", header.geometry.nbytes - PAGE)
