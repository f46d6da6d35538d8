"""BucketIndex against a dict, also where buckets overflow; its bounds; its readers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmkv_ray.index import LANES, PROBES, BucketIndex, key_tags
from lmkv_ray.keys import KeyArray


def some_keys(count: int, seed: int = 0) -> KeyArray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)


def keys_of_homes(homes: list[int], buckets: int, each: int) -> KeyArray:
    """Keys whose home bucket is one of ``homes``."""
    keys = some_keys(buckets * each * 4)
    home = key_tags(keys) >> np.uint64(64 - buckets.bit_length() + 1)
    return np.concatenate([keys[home == h][:each] for h in homes])


def make(capacity: int) -> BucketIndex:
    return BucketIndex(bytearray(BucketIndex.nbytes(capacity)), capacity)


# 16 buckets of 8 lanes. Forty keys share the last bucket and its neighbours, so that they spill
# past the end of the table and through full buckets, but always within eight buckets.
POOL = keys_of_homes([15, 0], 16, each=20)
picks = st.lists(st.integers(0, len(POOL) - 1), max_size=30)


class IndexIsADict(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(BucketIndex.nbytes(50))
        self.index = BucketIndex(self.buffer, 50)
        self.model: dict[int, int] = {}
        self.next_row = 0

    @rule(chosen=picks)
    def insert(self, chosen: list[int]) -> None:
        rows = np.arange(self.next_row, self.next_row + len(chosen))
        self.next_row += len(chosen)
        assert self.index.insert(POOL[chosen], rows).all()
        self.model.update(zip(chosen, rows.tolist(), strict=True))

    @rule(chosen=picks)
    def remove(self, chosen: list[int]) -> None:
        self.index.remove(POOL[chosen])
        for i in chosen:
            self.model.pop(i, None)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.model.clear()

    @invariant()
    def equal(self) -> None:
        reader = BucketIndex(bytes(self.buffer), 50)
        expected = [self.model.get(i, -1) for i in range(len(POOL))]
        assert reader.lookup(POOL).tolist() == expected
        assert len(reader) == len(self.model)

    @invariant()
    def empty_leaves_no_trace(self) -> None:
        if not self.model:
            assert not self.index._spilled.any(), "readers would probe on for ever"


TestIndexIsADict = IndexIsADict.TestCase
TestIndexIsADict.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("capacity", [1, 30, 1_000, 100_000])
def test_holds_its_capacity(capacity: int) -> None:
    index, keys = make(capacity), some_keys(capacity)
    assert index.insert(keys, np.arange(capacity)).all()
    assert (index.lookup(keys) == np.arange(capacity)).all()
    assert (index.lookup(some_keys(1_000, seed=1)) == -1).all()
    index.remove(keys[::2])
    assert (index.lookup(keys[::2]) == -1).all()
    assert (index.lookup(keys[1::2]) == np.arange(capacity)[1::2]).all()


def test_an_overfull_neighbourhood_refuses_and_keeps_the_rest() -> None:
    index, keys = make(1), keys_of_homes([3], 8, each=PROBES * LANES + 5)
    stored = index.insert(keys, np.arange(len(keys)))
    assert stored.sum() == PROBES * LANES
    assert (index.lookup(keys) == np.where(stored, np.arange(len(keys)), -1)).all()
    index.remove(keys[stored][:1])
    assert index.insert(keys[~stored][:1], [99]).all(), "room again"


def test_empty_batches() -> None:
    index, none = make(10), some_keys(0)
    assert index.insert(none, []).shape == (0,)
    assert index.lookup(none).shape == (0,)
    index.remove(none)


def test_a_read_only_buffer_is_a_read_only_index() -> None:
    index = BucketIndex(bytes(BucketIndex.nbytes(10)), 10)
    with pytest.raises(ValueError, match="read-only"):
        index.insert(some_keys(1), [1])


@pytest.mark.parametrize("seed", range(5))
def test_torn_views_never_crash(seed: int) -> None:
    """Whatever bytes a reader sees, it answers rows or -1."""
    index = make(20)
    noise = np.random.default_rng(seed)
    keys = some_keys(200)
    index._rows[:] = noise.integers(0, 2**32, len(index._rows), dtype=np.uint32)
    index._tags[:] = noise.choice(key_tags(keys), len(index._tags))
    index._spilled[:] = noise.integers(0, 256, len(index._spilled), dtype=np.uint8)
    rows = index.lookup(keys)
    assert ((rows >= -1) & (rows < 2**32)).all()
