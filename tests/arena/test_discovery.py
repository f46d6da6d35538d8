"""Which arena of a host an engine is likely to be given, known before it has asked its shard."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmkv_ray.arena import ArenaWriter, find_arena
from tests.arena.conftest import CAPACITY


@pytest.fixture
def writers(name: str) -> Iterator[list[ArenaWriter]]:
    made = [ArenaWriter.create(f"{name}.node{i}", CAPACITY) for i in range(2)]
    yield made
    for writer in made:
        writer.close()


def test_the_only_one_with_a_living_writer_is_found(name: str, writers: list[ArenaWriter]) -> None:
    assert find_arena(name) is None, "nobody knows which of two"
    writers[0]._tables.header["writer_start"] = 1  # what its successor would find
    found = find_arena(name)
    assert found is not None
    assert found.arena_id == writers[1].arena_id
    writers[1]._tables.header["writer_start"] = 1
    assert find_arena(name) is None


def test_an_arena_of_another_family_is_not(name: str, writers: list[ArenaWriter]) -> None:
    writers[0]._tables.header["writer_start"] = 1
    assert find_arena(name[:-1]) is None
    assert find_arena(f"{name}.node1") is None


def test_one_of_another_version_is_not(name: str, writers: list[ArenaWriter]) -> None:
    writers[0]._tables.header["magic"] = 0
    found = find_arena(name)
    assert found is not None
    assert found.arena_id == writers[1].arena_id


def test_what_was_found_is_held_no_longer_than_it_is_wanted(
    name: str, writers: list[ArenaWriter]
) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()  # what other tests have left
    before = descriptors()
    assert find_arena(name) is None
    assert descriptors() == before
    writers[0]._tables.header["writer_start"] = 1
    found = find_arena(name)
    assert descriptors() > before
    del found
    gc.collect()
    assert descriptors() == before
