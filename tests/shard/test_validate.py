"""What a fault in the shard's or the directory's tables would look like is noticed."""

from collections.abc import Callable

import pytest

from lmkv_ray.directory import DirectoryState
from lmkv_ray.keys import key_array
from lmkv_ray.messages import Commit, Delta, Exchange, Hello, Owner
from lmkv_ray.policies import LRU
from lmkv_ray.shard import Allocator, DeltaLog, Limits, ShardState
from lmkv_ray.story import LENGTH

A, B = b"a" * 16, b"b" * 16
ENGINE = Owner(pid=2, start=1)


@pytest.fixture
def state() -> ShardState:
    """Two ready chunks (slots 0 and 1), of which A is pinned, and two leased slots."""
    limits = Limits(holder_slots=8)
    state = ShardState(
        Allocator(4, 64, 8, LRU), Owner(pid=1, start=1), DeltaLog("n", 1), limits=limits
    )
    state.hello(Hello(engine_id="e", owner=ENGINE, space=7, model="m", slot_bytes=8, held=[]), 0)
    state.exchange(Exchange(engine_id="e", want=4), 0)
    commits = [Commit(slot=slot, key=key, nbytes=5) for slot, key in enumerate((A, B))]
    state.exchange(Exchange(engine_id="e", commits=commits), 0)
    state.chunks.pin([A], True)
    state.validate()
    return state


def two_owners(state: ShardState) -> None:
    state._leases.rest([2], 5)


def leased_and_free(state: ShardState) -> None:
    state._extents.free(2)


def reserved_without_owner(state: ShardState) -> None:
    state._leases.holders["e"].leases.clear()


def two_chunks_in_a_slot(state: ShardState) -> None:
    state._allocator.slot_of[A] = 1


def chunk_without_slot(state: ShardState) -> None:
    state._allocator.evict([B])


def bytes_miscounted(state: ShardState) -> None:
    state.chunks.nbytes += 1


def pin_without_count(state: ShardState) -> None:
    state._allocator._pinned_chunks[0] = 0


def free_twice(state: ShardState) -> None:
    state._extents.classes[8].free.append(7)


def extent_nowhere(state: ShardState) -> None:
    state._extents._unassigned.pop()


def policy_forgets(state: ShardState) -> None:
    state._extents.classes[8].policy.removed(B)


def too_many_leases(state: ShardState) -> None:
    state._leases.holders["e"].leases |= dict.fromkeys(
        state._extents.take(state._extents.classes[8], 4), 9.0
    )
    state.limits = Limits(holder_slots=4)


def device_of_a_stranger(state: ShardState) -> None:
    state.devices.told("x", A, b"")


@pytest.mark.parametrize(
    "fault",
    [
        two_owners,
        leased_and_free,
        reserved_without_owner,
        two_chunks_in_a_slot,
        chunk_without_slot,
        bytes_miscounted,
        pin_without_count,
        free_twice,
        extent_nowhere,
        policy_forgets,
        too_many_leases,
        device_of_a_stranger,
    ],
)
def test_a_fault_of_the_shard_is_noticed(
    state: ShardState, fault: Callable[[ShardState], None]
) -> None:
    fault(state)
    with pytest.raises(AssertionError):
        state.validate()


def lost_count(directory: DirectoryState) -> None:
    directory.table._counts[directory._nodes["a"].number] += 1


def lost_index(directory: DirectoryState) -> None:
    directory.table._index.remove(key_array(A))


def row_free_and_used(directory: DirectoryState) -> None:
    directory.table._n_freed += 1


def unknown_number(directory: DirectoryState) -> None:
    del directory._nodes["a"]


@pytest.mark.parametrize("fault", [lost_count, lost_index, row_free_and_used, unknown_number])
def test_a_fault_of_the_directory_is_noticed(fault: Callable[[DirectoryState], None]) -> None:
    directory = DirectoryState(64)
    directory.delta(
        Delta(node_id="a", epoch=1, seq=1, added=A + B, removed=b"", begin=True, end=True), 0
    )
    directory.validate()
    fault(directory)
    with pytest.raises(AssertionError):
        directory.validate()


def test_the_story_is_bounded_and_ends_with_the_last_event(state: ShardState) -> None:
    for _ in range(2 * LENGTH):
        state.exchange(Exchange(engine_id="e"), 1)
    state.clear()
    assert len(state.story) == LENGTH
    assert list(state.story)[-2:] == [
        ("exchange", 1, "e", 0, 0, 0),
        ("clear", None, None, 2),
    ]
