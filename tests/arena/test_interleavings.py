"""What a reader copies is right however its loads and the writer's stores interleave.

The stores of a writer are recorded one by one, while it runs alone. Then a reader runs against them
again and again: before any of its loads the next so many stores have happened. Up to two such
moments are tried with every number of stores, on an arena of one extent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from lmkv_ray.arena import ArenaReader, ArenaWriter, this_process
from lmkv_ray.errors import ArenaError
from lmkv_ray.messages import MissReason
from tests.arena.conftest import SLOT, SPACE, fill, some_keys

KEYS = some_keys(4)
SMALL = SLOT // 2


class Watched(np.ndarray):
    """Says before each load, and instead of each store, that it is one."""

    load: Callable[[], None]
    store: Callable[[np.ndarray, Any, Any], None]

    def __array_finalize__(self, base: object) -> None:
        if isinstance(base, Watched):
            self.load, self.store = base.load, base.store

    def __getitem__(self, where: Any) -> Any:
        if isinstance(where, str):
            return super().__getitem__(where)  # a column: nothing is loaded
        self.load()
        return np.asarray(super().__getitem__(where))

    def take(self, *args: Any, **options: Any) -> Any:
        self.load()
        return np.asarray(self).take(*args, **options)

    def __setitem__(self, where: Any, value: Any) -> None:
        self.store(np.asarray(self), where, np.asarray(value))


def watched(array: np.ndarray, load: Callable[[], None], store: Any) -> Any:
    view = array.view(Watched)
    view.load, view.store = load, store
    return view


@contextmanager
def watch(tables: Any, load: Callable[[], None], store: Any) -> Iterator[None]:
    """All that reader and writer share."""
    index, ghosts = tables.index, tables.ghosts
    shared = [(tables, "slots"), (tables, "slot_bytes"), (ghosts, "_entries")]
    shared += [(index, name) for name in ("_tags", "_rows", "_spilled", "_buckets")]
    before = [getattr(owner, name) for owner, name in shared]
    for (owner, name), array in zip(shared, before, strict=True):
        setattr(owner, name, watched(array, load, store))
    yield
    for (owner, name), array in zip(shared, before, strict=True):
        setattr(owner, name, array)


Store = tuple[np.ndarray, Any, np.ndarray]


def recorded(writer: ArenaWriter, act: Callable[[], None]) -> list[Store]:
    """The stores of ``act``, one element at a time, in order."""
    stores: list[Store] = []

    def note(array: np.ndarray, where: Any, value: np.ndarray) -> None:
        # numpy stores an array element by element: any number of them may be seen.
        at = np.arange(len(array))[where].reshape(-1)
        values = np.broadcast_to(value, np.shape(array[at])).copy()
        for i, one in zip(at.tolist(), values, strict=True):
            stores.append((array, i, one))
            array[i] = one

    with watch(writer._tables, lambda: None, note):
        writer._slots = writer._tables.slots
        payload = writer._data
        writer._data = watched(payload, lambda: None, note)
        act()
        writer._data = payload
    writer._slots = writer._tables.slots
    return stores


@pytest.mark.parametrize("by", ["hits", "offsets"])
@pytest.mark.parametrize("again", [0, 2])
def test_no_interleaving_gives_wrong_bytes(writer: ArenaWriter, by: str, again: int) -> None:
    """An extent is emptied, cut anew, and slot 2 gets a chunk: of key 2 again, or of key 0.

    The reader copies from the offsets of its hits, or from those of slots that it was told of.
    """
    reader = ArenaReader.attach(writer.path)
    old = writer.assign_extent(0, SLOT)
    mine, key = old[2:3], KEYS[2:3]
    fill(writer, mine, key)
    # At the offset of every slot of either size stands which chunk it is; 0: none.
    heads = np.arange(0, writer.geometry.extent_bytes, SMALL)
    writer._data[heads] = 0
    writer._data[2 * SLOT] = 3

    def act() -> None:
        writer.retire(mine, MissReason.EVICTED)
        writer.assign_extent(0, SMALL)
        writer.reserve(mine, this_process())
        writer._data[np.array([2 * SMALL])] = np.array([again + 1], np.uint8)
        writer.publish(mine, KEYS[again : again + 1], SMALL, SPACE)
        # Old bytes are another chunk's by now.
        writer.reserve(old[4:5], this_process())
        writer._data[np.array([4 * SMALL])] = np.array([99], np.uint8)

    shared, index = writer._tables, writer._tables.index
    tables: list[np.ndarray] = [index._tags, index._rows, index._spilled]
    tables += [shared.slot_bytes, shared.slots[: writer.geometry.slots_per_extent]]
    first = [array.copy() for array in tables]
    first_heads = writer._data[heads].copy()
    stores = recorded(writer, act)
    assert len(stores) > 20

    def rewind() -> None:
        for array, content in zip(tables, first, strict=True):
            array[...] = content
        writer._data[heads] = first_heads

    def copy() -> bool | None:
        """Whether what was copied is right; None: it was not believed."""
        hits = reader.lookup(key)
        if not hits.found[0]:
            return None
        at = int(hits.offsets[0])
        if by == "offsets":
            try:
                at = int(reader.offsets(hits.slots, SMALL)[0])
            except ArenaError:
                return None
        got = int(data[np.array([at])][0])
        return got == 3 if reader.unchanged(hits.slots, hits.generations)[0] else None

    stops: dict[int, int] = {}
    loads = stored = 0

    def before_load() -> None:
        nonlocal loads, stored
        until = stops.get(loads, 0)
        loads += 1
        for array, where, value in stores[stored:until]:
            array[where] = value
        stored = max(stored, until)

    results = []
    with watch(reader._tables, before_load, None):
        slots = reader._tables.slots
        reader._keys, reader._generations = slots["key"], slots["generation"]
        reader._nbytes = slots["nbytes"]
        data = watched(reader.data, before_load, None)
        rewind()
        assert copy() is True
        moments = range(loads)
        assert len(moments) >= 7
        counts = range(1, len(stores) + 1)
        for one, two in itertools.combinations_with_replacement(moments, 2):
            for few, more in itertools.combinations_with_replacement(counts, 2):
                if (one == two) != (few == more):
                    continue
                rewind()
                stops, loads, stored = {one: few, two: more}, 0, 0
                results.append(copy())
    reader.close()
    assert False not in results
    assert {True, None} == set(results)
