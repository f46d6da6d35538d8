import pytest

from lmkv_ray.policies import LRU
from lmkv_ray.shard import Allocator
from lmkv_ray.shard.allocator import Assigned, Evicted


def keys(name: str, n: int) -> list[bytes]:
    return [f"{name}{i}".encode().ljust(16) for i in range(n)]


def fill(allocator: Allocator, slot_bytes: int, names: list[bytes]) -> list[int]:
    slots = [allocator.take(slot_bytes, 1).slots[0] for _ in names]
    for slot, key in zip(slots, names, strict=True):
        allocator.fill(slot, key)
    return slots


@pytest.fixture
def allocator() -> Allocator:
    """Two extents of four slots of 16 bytes (or eight of 8)."""
    return Allocator(extents=2, extent_bytes=64, min_slot_bytes=8, make_policy=LRU)


def test_slot_ids_are_a_grid(allocator: Allocator) -> None:
    assert allocator.take(16, 8).slots == (0, 1, 2, 3, 8, 9, 10, 11)


def test_takes_unassigned_extents_before_evicting(allocator: Allocator) -> None:
    fill(allocator, 16, keys("a", 4))
    assert allocator.take(16, 1).steps == (Assigned(1, 16),)


def test_evicts_its_own_when_full(allocator: Allocator) -> None:
    names = keys("a", 8)
    slots = fill(allocator, 16, names)
    allocator.touch([names[0]])
    taken = allocator.take(16, 2)
    assert taken.steps == (Evicted((slots[1], slots[2]), (names[1], names[2])),)
    assert taken.slots == (slots[1], slots[2])


def test_freed_slots_are_reused_oldest_first(allocator: Allocator) -> None:
    a, b, c = allocator.take(16, 3).slots
    for slot in (c, a, b):
        allocator.extents.free(slot)
    assert allocator.take(16, 4).slots == (3, c, a, b)


def test_a_new_class_takes_over_the_coldest_extent(allocator: Allocator) -> None:
    names = keys("a", 8)
    fill(allocator, 16, names)
    allocator.touch(names[:4])  # extent 0 is warmer now
    taken = allocator.take(8, 3)
    assert [type(step) for step in taken.steps] == [Evicted, Assigned]
    assert taken.slots == (8, 9, 10)
    assert set(names[:4]) == set(allocator.slot_of)


def test_memory_of_an_unused_class_is_taken_over_before_own_chunks_are_evicted(
    allocator: Allocator,
) -> None:
    fill(allocator, 16, keys("old", 4))
    fill(allocator, 8, keys("new", 8))
    taken = allocator.take(8, 1)
    assert taken.slots == (0,)
    assert len(allocator.slot_of) == 8


def test_a_class_that_is_used_keeps_its_memory(allocator: Allocator) -> None:
    names = keys("old", 4)
    fill(allocator, 16, names)
    fill(allocator, 8, keys("new", 8))
    allocator.touch(names)
    allocator.take(8, 8)
    assert set(names) == set(allocator.slot_of)


def test_an_extent_with_pins_is_drained_for_a_class_that_has_nothing(allocator: Allocator) -> None:
    first = allocator.take(16, 5).slots  # four in extent 0, one in extent 1
    fill(allocator, 16, keys("a", 3))
    assert allocator.take(8, 1).slots == ()
    assert allocator.take(8, 1).slots == ()
    allocator.fill(first[4], b"late".ljust(16))  # the last pin of extent 1
    taken = allocator.take(8, 2)
    assert taken.slots == (8, 9)
    assert allocator.extents.slot_bytes(first[4]) == 8
    assert allocator.slot_of == {}
    assert allocator.take(16, 1).slots == ()  # extent 0 is all pinned


def test_slots_of_a_draining_extent_are_not_handed_out(allocator: Allocator) -> None:
    first = allocator.take(16, 5).slots
    allocator.take(8, 1)
    assert allocator.take(16, 4).slots == ()
    allocator.extents.free(first[4])
    assert allocator.take(16, 4).slots == (8, 9, 10, 11)  # nobody else came for it


def test_pinned_chunks_stay(allocator: Allocator) -> None:
    names = keys("a", 8)
    fill(allocator, 16, names)
    assert [allocator.pin(key, True) for key in names[:5]] == [True] * 4 + [False]  # half
    assert allocator.take(16, 8).steps == (Evicted((8, 9, 10, 11), tuple(names[4:])),)
    assert set(names[:4]) == set(allocator.slot_of)


def test_pins_end_with_their_chunk_or_before(allocator: Allocator) -> None:
    names = keys("a", 8)
    fill(allocator, 16, names)
    for key in names[:4]:
        allocator.pin(key, True)
    allocator.evict(names[:1])
    assert not allocator.pin(names[1], False)
    assert allocator.pin(names[4], True)
    assert not allocator.pin(b"unknown".ljust(16), True)
    assert set(allocator.take(16, 8).steps[0].keys) == {names[1], *names[5:]}  # type: ignore[union-attr]


def test_an_extent_with_pinned_chunks_is_taken_over_last(allocator: Allocator) -> None:
    names = keys("a", 8)
    fill(allocator, 16, names)
    allocator.pin(names[0], True)  # in extent 0, which is colder
    assert allocator.take(8, 8).slots == tuple(range(8, 16))
    allocator = Allocator(extents=1, extent_bytes=64, min_slot_bytes=8, make_policy=LRU)
    fill(allocator, 16, names[:4])
    allocator.pin(names[0], True)
    assert allocator.take(8, 1).slots == ()
    assert allocator.take(8, 1).slots == (0,)  # it would have no memory at all


def test_a_large_class_lets_evicted_slots_rest() -> None:
    allocator = Allocator(extents=1, extent_bytes=64 * 8, min_slot_bytes=8, make_policy=LRU)
    slots = fill(allocator, 8, keys("a", 62))
    taken = allocator.take(8, 3)
    assert taken.slots == (62, 63, slots[0])
    assert len(allocator.slot_of) == 62 - 3  # one, and two that rest
