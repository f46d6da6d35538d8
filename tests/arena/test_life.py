"""The life of a slot, as its writer and a reader see it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmkv_ray.arena import ArenaReader, ArenaWriter, this_process
from lmkv_ray.arena.ghosts import GhostTable
from lmkv_ray.errors import ArenaError
from lmkv_ray.messages import MissReason
from tests.arena.conftest import CAPACITY, SLOT, SPACE, content_of, fill, some_keys

KEYS = some_keys(8)


def test_a_chunk_is_visible_only_when_it_is_published(
    writer: ArenaWriter, reader: ArenaReader
) -> None:
    slots = writer.assign_extent(1, SLOT)
    writer.reserve(slots[:1], this_process())
    assert not reader.lookup(KEYS).found.any()
    reader.payload(int(slots[0]), SLOT)[:] = content_of(KEYS[0])
    writer.publish(slots[:1], KEYS[:1], SLOT - 5, SPACE)
    hits = reader.lookup(KEYS)
    assert hits.found.tolist() == [True] + [False] * 7
    assert hits.run == 1
    assert hits.nbytes[0] == SLOT - 5
    found = reader.data[hits.offsets[0] : hits.offsets[0] + hits.nbytes[0]]
    assert (found == content_of(KEYS[0])[:-5]).all()
    assert hits.offsets[0] == reader.offsets(slots, SLOT)[0]
    assert reader.unchanged(hits.slots[:1], hits.generations[:1]).all()


def test_a_retired_chunk_is_gone_and_says_why(writer: ArenaWriter, reader: ArenaReader) -> None:
    slots = writer.assign_extent(0, SLOT)
    fill(writer, slots[:8], KEYS)
    hits = reader.lookup(KEYS)
    writer.retire(slots[:2], MissReason.EVICTED)
    writer.retire(slots[2:3], MissReason.CLEARED)
    assert reader.unchanged(hits.slots, hits.generations).tolist() == [False] * 3 + [True] * 5
    assert reader.lookup(KEYS).found.tolist() == [False] * 3 + [True] * 5
    assert reader.reasons(np.concatenate([KEYS[:3], some_keys(1, seed=9)])) == [
        MissReason.EVICTED,
        MissReason.EVICTED,
        MissReason.CLEARED,
        MissReason.NEVER_STORED,
    ]


def test_every_reuse_changes_the_generation(writer: ArenaWriter, reader: ArenaReader) -> None:
    slot = writer.assign_extent(0, SLOT)[:1]
    seen = []
    for key in KEYS:
        fill(writer, slot, key[None])
        hits = reader.lookup(key[None])
        seen.append(int(hits.generations[0]))
        writer.retire(slot, MissReason.EVICTED)
        writer.reserve(slot, this_process())
        writer.free(slot)
    assert len(set(seen)) == len(KEYS)


def test_a_stale_index_entry_is_a_miss(writer: ArenaWriter, reader: ArenaReader) -> None:
    slots = writer.assign_extent(0, SLOT)
    fill(writer, slots[:1], KEYS[:1])
    index = writer._tables.index
    # Entries for another key's row, a free row, an unassigned extent, and beyond the arena.
    index.insert(KEYS[1:5], [slots[0], slots[3], 3 * writer.geometry.slots_per_extent, 2**31])
    assert reader.lookup(KEYS).found.tolist() == [True] + [False] * 7


def test_checksums_belong_to_a_generation(writer: ArenaWriter, reader: ArenaReader) -> None:
    slots = writer.assign_extent(0, SLOT)
    fill(writer, slots[:1], KEYS[:1])
    hits = reader.lookup(KEYS[:1])
    assert reader.checksums(hits.slots).tolist() == [0]
    writer.set_checksum(int(slots[0]), int(hits.generations[0]), 77)
    writer.set_checksum(int(slots[0]), int(hits.generations[0]) - 2, 78)
    assert reader.checksums(hits.slots).tolist() == [77]
    writer.retire(slots[:1], MissReason.EVICTED)
    fill(writer, slots[:1], KEYS[1:2])
    assert reader.checksums(slots[:1]).tolist() == [0]


def test_an_extent_can_be_cut_anew_when_it_is_empty(
    writer: ArenaWriter, reader: ArenaReader
) -> None:
    small = writer.assign_extent(0, SLOT)
    fill(writer, small[-1:], KEYS[:1])
    hits = reader.lookup(KEYS[:1])
    with pytest.raises(ArenaError, match="in use"):
        writer.assign_extent(0, 2 * SLOT)
    writer.retire(small[-1:], MissReason.EVICTED)
    large = writer.assign_extent(0, 2 * SLOT)
    assert len(large) == len(small) // 2
    writer.reserve(large, this_process())
    assert not reader.unchanged(hits.slots, hits.generations).any()
    with pytest.raises(ArenaError, match="does not have"):
        reader.offsets(small, SLOT)
    writer.free(large)
    tiny = writer.assign_extent(0, SLOT // 2)
    assert len(reader.offsets(tiny, SLOT // 2)) == 2 * len(small)
    with pytest.raises(ArenaError, match="does not have"):
        reader.offsets(tiny[-1:], SLOT)  # would be copied from beyond the extent
    # The offsets of an old hit stay safe to touch.
    assert reader.data[hits.offsets[0] : hits.offsets[0] + hits.nbytes[0]].nbytes == SLOT


def test_wrong_use_is_refused_and_changes_nothing(writer: ArenaWriter) -> None:
    slots = writer.assign_extent(0, SLOT)
    before = writer._slots.copy()
    with pytest.raises(ArenaError, match="not all reserved"):
        writer.publish(slots[:1], KEYS[:1], SLOT, SPACE)
    with pytest.raises(ArenaError, match="not all ready"):
        writer.retire(slots[:1], MissReason.EVICTED)
    with pytest.raises(ArenaError, match="assigned extents"):
        writer.reserve(slots + writer.geometry.slots_per_extent, this_process())
    with pytest.raises(ArenaError, match="not a slot size"):
        writer.assign_extent(1, SLOT + 1)
    assert (writer._slots == before).all()


def test_assigned_ranges_and_populate(writer: ArenaWriter, reader: ArenaReader) -> None:
    assert reader.assigned() == []
    for extent in (0, 1, 3):
        writer.assign_extent(extent, SLOT)
    assert reader.assigned() == [(0, 2 << 20), (3 << 20, 1 << 20)]
    assert sum(reader.populate()) == 3 << 20


def test_ghosts_are_bounded_and_never_wrong_for_long() -> None:
    entries = GhostTable.entries_for(0)
    table = GhostTable(bytearray(entries * 8), entries)
    keys = some_keys(3 * entries)
    table.remember(keys[:entries], MissReason.EVICTED)
    table.remember(keys[-entries:], MissReason.CLEARED)
    assert set(table.reasons(keys[-entries:])) <= {MissReason.CLEARED, MissReason.NEVER_STORED}
    assert table.reasons(keys[-entries:]).count(MissReason.CLEARED) > entries // 2
    assert set(table.reasons(keys[entries:-entries])) == {MissReason.NEVER_STORED}


class SlotsAsAModel(RuleBasedStateMachine):
    """Random lives of sixteen slots; after each step a reader sees exactly what is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.writer = ArenaWriter.create("testmodel", CAPACITY)
        self.reader = ArenaReader.attach(self.writer.path)
        self.slots = self.writer.assign_extent(0, SLOT)
        self.keys = some_keys(16)
        self.state = ["free"] * 16
        self.me = this_process()

    def _take(self, chosen: set[int], state: str, new: str) -> list[int]:
        ready = [i for i in sorted(chosen) if self.state[i] == state]
        for i in ready:
            self.state[i] = new
        return ready

    @rule(chosen=st.sets(st.integers(0, 15)))
    def reserve(self, chosen: set[int]) -> None:
        self.writer.reserve(self.slots[self._take(chosen, "free", "reserved")], self.me)

    @rule(chosen=st.sets(st.integers(0, 15)))
    def publish(self, chosen: set[int]) -> None:
        at = self._take(chosen, "reserved", "ready")
        self.writer.publish(self.slots[at], self.keys[at], SLOT, SPACE)

    @rule(chosen=st.sets(st.integers(0, 15)))
    def retire(self, chosen: set[int]) -> None:
        at = self._take(chosen, "ready", "free")
        self.writer.retire(self.slots[at], MissReason.EVICTED)

    @rule(chosen=st.sets(st.integers(0, 15)))
    def free(self, chosen: set[int]) -> None:
        self.writer.free(self.slots[self._take(chosen, "reserved", "free")])

    @rule()
    def successor(self) -> None:
        self.writer.close()
        self.writer = ArenaWriter.adopt(self.reader._segment.path)

    @invariant()
    def readers_see_what_is_ready(self) -> None:
        hits = self.reader.lookup(self.keys)
        assert hits.found.tolist() == [state == "ready" for state in self.state]
        assert (hits.slots[hits.found] == self.slots[:16][hits.found]).all()

    @invariant()
    def a_successor_would_see_it_too(self) -> None:
        content = self.writer.scan()
        by_state: dict[str, list[int]] = {state: [] for state in ("free", "reserved", "ready")}
        for slot, state in zip(self.slots.tolist(), self.state, strict=True):
            by_state[state].append(slot)
        assert content.ready.tolist() == by_state["ready"]
        assert content.reserved == dict.fromkeys(by_state["reserved"], self.me)

    def teardown(self) -> None:
        self.writer.close()
        self.reader.close()


TestSlotsAsAModel = SlotsAsAModel.TestCase
TestSlotsAsAModel.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
