"""The index against a model: what is counted, found and chosen."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmkv_ray.policies import LRU
from lmkv_ray.tiers.disk.index import DiskIndex, Entry, State
from lmkv_ray.tiers.format import Label

KEYS = [bytes([i]) * 16 for i in range(8)]
CAPACITY = 40
MAX_CHUNKS = 5
keys = st.sampled_from(KEYS)


class IndexMachine(RuleBasedStateMachine):
    """A disk that obeys the index, late and in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = LRU()
        self.index = DiskIndex(CAPACITY, self.policy, MAX_CHUNKS)
        self.writing: list[Entry] = []
        self.erasing: list[Entry] = []
        self.reading: list[Entry] = []
        self.files: set[Entry] = set()
        self.pinned: set[bytes] = set()

    @rule(key=keys, blocks=st.integers(1, 20), space=st.integers(0, 1))
    def store(self, key: bytes, blocks: int, space: int) -> None:
        if self.index.knows(key):
            assert self.index.reserve(Label(key, space, blocks), blocks) is None
            return
        candidates = [
            entry for entry in self.files
            if entry.state is State.HERE and not entry.pinned and not entry.readers
        ]  # fmt: skip
        victims = self.index.make_room(blocks)
        if victims is None:
            free = CAPACITY - self.index.used + sum(entry.blocks for entry in candidates)
            others = len(self.index.keys()) - len(candidates)
            assert free < blocks or others >= MAX_CHUNKS, "it always makes progress if it can"
            return
        assert set(victims) <= set(candidates)
        for entry in victims:
            self._erase(entry)
        reserved = self.index.reserve(Label(key, space, blocks), blocks)
        assert reserved is not None
        self.writing.append(reserved)
        self.files.add(reserved)

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), success=st.booleans())
    def written(self, data: st.DataObject, success: bool) -> None:
        entry = data.draw(st.sampled_from(self.writing))
        self.writing.remove(entry)
        if not (success and self.index.publish(entry)):
            self._erase(entry)

    @rule(key=keys)
    def forget(self, key: bytes) -> None:
        entry = self.index.forget(key)
        assert self.index.get(key) is None
        if entry is not None:
            self.erasing.append(entry)

    @precondition(lambda self: self.erasing)
    @rule(data=st.data())
    def erased(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.erasing))
        self.erasing.remove(entry)
        self._erase(entry)

    @rule(key=keys)
    def read(self, key: bytes) -> None:
        entry = self.index.get(key)
        if entry is not None:
            self.index.begin_read(entry)
            self.reading.append(entry)

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), corrupt=st.booleans())
    def has_read(self, data: st.DataObject, corrupt: bool) -> None:
        entry = data.draw(st.sampled_from(self.reading))
        self.reading.remove(entry)
        self.index.end_read(entry)
        if corrupt and entry in self.files and entry not in self.erasing:
            self._erase(entry)

    @rule(key=keys, pinned=st.booleans())
    def pin(self, key: bytes, pinned: bool) -> None:
        self.index.pin(key, pinned)
        self.index.touched([key])

    @invariant()
    def what_is_counted_covers_what_is_on_the_medium(self) -> None:
        opened = self.files | set(self.reading)  # unlinked files live until they are closed
        assert self.index.used == sum(entry.blocks for entry in opened)
        assert self.index.used <= CAPACITY
        assert len(self.index.keys()) == len(opened) <= MAX_CHUNKS

    @invariant()
    def the_policy_knows_what_may_go(self) -> None:
        here = [entry for entry in self.files if entry.state is State.HERE]
        assert len(self.index) == len(here)
        evictable = {entry.label.key for entry in here if not entry.pinned}
        assert set(self.policy.victims(99)) == evictable

    def _erase(self, entry: Entry) -> None:
        self.index.erased(entry)
        self.files.discard(entry)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_evicts_what_was_not_used_for_longest() -> None:
    index = DiskIndex(30, LRU())
    for key in KEYS[:3]:
        index.recover(Label(key, 0, 10), 10)
    index.touched([KEYS[0]])
    victims = index.make_room(15)
    assert victims is not None
    assert [entry.label.key for entry in victims] == [KEYS[1], KEYS[2]]


def test_what_is_larger_than_all_evicts_nothing() -> None:
    index = DiskIndex(30, LRU())
    index.recover(Label(KEYS[0], 0, 10), 10)
    assert index.make_room(31) is None
    assert index.get(KEYS[0]) is not None
