"""Two processes and one arena: torn copies are noticed, and a killed writer loses nothing ready."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection

import numpy as np
import pytest

from lmkv_ray.arena import ArenaReader, ArenaWriter, this_process
from lmkv_ray.arena.format import HEADER_BYTES, SlotState
from lmkv_ray.arena.segment import Segment
from lmkv_ray.errors import ArenaError
from lmkv_ray.messages import MissReason
from tests.arena.conftest import CAPACITY, SLOT, SPACE, Spawn, content_of, fill, some_keys

KEYS = some_keys(12)


def copy_while_told(connection: Connection, path: str) -> None:
    """Answer each lookup in two halves, so that the parent can act between lookup and copy."""
    reader = ArenaReader.attach(path)
    connection.send(None)
    while True:
        wanted = connection.recv()
        hits = reader.lookup(KEYS[wanted : wanted + 1])
        connection.send(hits.found.all())
        connection.recv()
        at = int(hits.offsets[0])
        copy = reader.data[at : at + SLOT].copy()
        intact = reader.unchanged(hits.slots, hits.generations).all()
        connection.send((bool(intact), bool((copy == content_of(KEYS[wanted])).all())))


def test_a_copy_of_a_slot_that_was_reused_is_noticed(writer: ArenaWriter, spawn: Spawn) -> None:
    slots = writer.assign_extent(0, SLOT)
    fill(writer, slots[:1], KEYS[:1])
    _, child = spawn(copy_while_told, writer.path)
    child.recv()

    child.send(0)
    assert child.recv()
    child.send("nothing happened")
    assert child.recv() == (True, True)

    child.send(0)
    assert child.recv()
    writer.retire(slots[:1], MissReason.EVICTED)
    fill(writer, slots[:1], KEYS[1:2])
    child.send("it is another chunk now")
    assert child.recv() == (False, False)


def copy_all_the_time(connection: Connection, path: str) -> None:
    """Look up, copy and verify until told to stop; report good, torn and WRONG copies."""
    reader = ArenaReader.attach(path)
    expected = [content_of(key) for key in KEYS]
    good = torn = wrong = 0
    connection.send(None)
    while not connection.poll():
        hits = reader.lookup(KEYS)
        for i in np.flatnonzero(hits.found):
            at = int(hits.offsets[i])
            copy = reader.data[at : at + SLOT].copy()
            if not reader.unchanged(hits.slots[i : i + 1], hits.generations[i : i + 1]).all():
                torn += 1
            elif (copy == expected[i]).all():
                good += 1
            else:
                wrong += 1
    connection.send((good, torn, wrong))


def test_never_wrong_bytes_under_fire(writer: ArenaWriter, spawn: Spawn) -> None:
    """Two slots, twelve keys, rewritten as fast as can be: every intact copy is right."""
    slots = writer.assign_extent(0, SLOT)[:2]
    _, child = spawn(copy_all_the_time, writer.path)
    child.recv()
    for i in range(3_000):
        slot = slots[i % 2 : i % 2 + 1]
        if i >= 2:
            writer.retire(slot, MissReason.EVICTED)
        fill(writer, slot, KEYS[i % 12 : i % 12 + 1])
    child.send("stop")
    good, _torn, wrong = child.recv()
    assert wrong == 0
    assert good > 0


def write_and_wait(connection: Connection, name: str) -> None:
    writer = ArenaWriter.create(name, CAPACITY)
    slots = writer.assign_extent(2, SLOT)
    fill(writer, slots[:8], KEYS[:8])
    writer.retire(slots[:1], MissReason.EVICTED)
    writer.reserve(slots[8:10], this_process())
    # As if killed in the middle: of a commit, of a retirement, and after a double commit.
    writer._slots["generation"][slots[1]] += np.uint64(1)
    writer._tables.index.remove(KEYS[2:3])
    fill(writer, slots[10:11], KEYS[3:4])
    connection.send((writer.path, writer.arena_id, slots))
    connection.recv()


def test_a_successor_adopts_what_a_killed_writer_left(name: str, spawn: Spawn) -> None:
    process, child = spawn(write_and_wait, name)
    path, arena_id, slots = child.recv()
    engine = ArenaReader.attach(path, arena_id)
    with pytest.raises(ArenaError, match="living writer"):
        ArenaWriter.adopt(path)
    assert ArenaWriter.find_and_adopt(name) is None

    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert ArenaWriter.find_and_adopt(name, capacity=2 * CAPACITY) is None
    shard = ArenaWriter.find_and_adopt(name, capacity=CAPACITY)
    assert shard is not None
    assert (shard.arena_id, shard.epoch) == (arena_id, 2)

    content = shard.scan()
    kept = [2, 3, 4, 5, 6, 7]
    assert sorted(map(tuple, content.keys.tolist())) == sorted(map(tuple, KEYS[kept].tolist()))
    assert set(content.reserved) == set(slots[8:10].tolist())
    assert content.slot_bytes.tolist() == [0, 0, SLOT, 0]
    assert set(content.spaces.tolist()) == {SPACE}
    hits = engine.lookup(KEYS)
    assert np.flatnonzero(hits.found).tolist() == kept, "an engine that was attached goes on"
    for i in kept:
        at = int(hits.offsets[i])
        assert (engine.data[at : at + SLOT] == content_of(KEYS[i])).all()
    assert engine.reasons(KEYS[:1]) == [MissReason.EVICTED]

    free = slots[shard._slots["state"][slots] == SlotState.FREE]
    assert len(free) == len(slots) - len(kept) - 2
    fill(shard, free[:1], KEYS[9:10])
    assert engine.lookup(KEYS[9:10]).found.all()
    shard.close()
    engine.close()


def test_without_any_holder_nothing_is_found(name: str, spawn: Spawn) -> None:
    process, child = spawn(write_and_wait, name)
    child.recv()
    process.kill()
    process.join()
    assert ArenaWriter.find_and_adopt(name) is None


def test_the_rebuilt_index_equals_the_old_one(writer: ArenaWriter) -> None:
    slots = writer.assign_extent(0, SLOT)
    fill(writer, slots[:12], KEYS)
    writer.retire(slots[3:5], MissReason.EVICTED)
    before = writer._tables.index.lookup(KEYS)
    writer._tables.index.clear()
    writer._tables.index.insert(some_keys(5, seed=3), np.arange(5))
    holder = Segment.open(writer.path)
    writer.close()
    successor = ArenaWriter.adopt(holder.path)
    assert (successor._tables.index.lookup(KEYS) == before).all()
    assert len(successor._tables.index) == 10
    successor.close()
    holder.close()


def test_a_damaged_arena_is_neither_attached_nor_adopted(writer: ArenaWriter, name: str) -> None:
    holder = Segment.open(writer.path)
    writer.close()
    holder.map(writable=True, nbytes=HEADER_BYTES)[20] ^= 1
    for use in (ArenaReader.attach, ArenaWriter.adopt):
        with pytest.raises(ArenaError, match=r"damaged.*Next step"):
            use(holder.path)
    assert ArenaWriter.find_and_adopt(name) is None
    holder.close()


def test_another_arena_than_expected_is_refused(writer: ArenaWriter) -> None:
    with pytest.raises(ArenaError, match="another arena"):
        ArenaReader.attach(writer.path, writer.arena_id + 1)
