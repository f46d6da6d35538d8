from collections.abc import Callable

import pytest
from msgspec.structs import replace

from lmkv_ray.errors import ArenaError, UnsupportedError
from lmkv_ray.hints import Hints
from lmkv_ray.messages import Commit, Exchange, ExchangeReply, Hello, MissReason, Owner
from lmkv_ray.policies import LRU
from lmkv_ray.shard import (
    Allocator,
    DeltaLog,
    Free,
    Instruction,
    Limits,
    Publish,
    RecoveredSlot,
    Reserve,
    Retire,
    ShardState,
    Spoil,
)

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
SHARD, ENGINE, OTHER = (Owner(pid=pid, start=1) for pid in (1, 2, 3))
LIMITS = Limits(grant_seconds=10, grace_seconds=3, holder_slots=6)


def make_state() -> ShardState:
    return ShardState(Allocator(4, 64, 8, LRU), SHARD, DeltaLog("n", 1), limits=LIMITS)


@pytest.fixture
def state() -> ShardState:
    return make_state()


@pytest.fixture
def hello() -> Callable[..., Hello]:
    def make(name: str = "e", owner: Owner = ENGINE, held: tuple[int, ...] = ()) -> Hello:
        return Hello(engine_id=name, owner=owner, space=7, model="m", slot_bytes=8, held=list(held))

    return make


HelloFactory = Callable[..., Hello]
Answer = tuple[ExchangeReply, list[Instruction]]


def grant(state: ShardState, n: int, now: float = 0.0, name: str = "e") -> list[int]:
    reply, _ = state.exchange(Exchange(engine_id=name, want=n), now)
    return reply.grant.slots if reply.grant else []


def commit(state: ShardState, slot: int, key: bytes, now: float, name: str = "e") -> Answer:
    message = Exchange(engine_id=name, commits=[Commit(slot=slot, key=key, nbytes=5)])
    return state.exchange(message, now)


def test_a_chunk_becomes_ready(state: ShardState, hello: HelloFactory) -> None:
    state.hello(hello(), 0)
    reply, out = state.exchange(Exchange(engine_id="e", want=2), 0)
    assert reply.grant is not None
    assert (reply.grant.slots, reply.grant.deadline) == ([0, 1], 10)
    assert out[-1] == Reserve((0, 1), ENGINE)
    reply, out = commit(state, 0, A, 9)
    assert reply.refused == []
    assert out == [Publish((0,), (A,), (5,), (7,))]
    assert A in state.chunks
    assert state.chunks.nbytes == 5


def test_an_unknown_engine_is_told_so(state: ShardState) -> None:
    assert commit(state, 0, A, 0)[0].known is False


def test_a_commit_after_the_deadline_is_refused_and_frees(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(hello(), 0)
    grant(state, 1)
    reply, out = commit(state, 0, A, 10.1)
    assert reply.refused == [0]
    assert out == [Free((0,))]


def test_an_expired_grant_is_not_reused_while_its_owner_lives(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(hello(), 0)
    state.hello(hello("f", OTHER), 0)
    mine = grant(state, 6)
    assert state.tick(1000) == []
    theirs = [slot for _ in range(9) for slot in grant(state, 9, 1000, "f")]
    assert not set(mine) & set(theirs)


def test_a_dead_owners_slots_rest_before_they_are_free(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(hello(), 0)
    slots = grant(state, 3)
    assert state.owners() == {ENGINE}
    state.owner_gone(ENGINE, 5)
    assert state.tick(7.9) == []
    assert state.tick(8) == [Free(tuple(slots))]
    assert state.owners() == set()


def test_the_first_of_two_equal_chunks_stays(state: ShardState, hello: HelloFactory) -> None:
    state.hello(hello(), 0)
    first, second = grant(state, 2)
    commit(state, first, A, 1)
    reply, out = commit(state, second, A, 1)
    assert reply.refused == []
    assert out == [Free((second,))]
    assert state.chunks.slot(A) == first


def test_grants_are_bounded(state: ShardState, hello: HelloFactory) -> None:
    state.hello(hello(), 0)
    assert len(grant(state, 99)) == 6
    assert grant(state, 1) == []


def test_grants_of_many_engines_leave_slots_to_stage_into(
    state: ShardState, hello: HelloFactory
) -> None:
    for number in range(9):
        state.hello(hello(f"e{number}", Owner(pid=100 + number, start=1)), 0)
        grant(state, 6, 0, f"e{number}")
    assert grant(state, 1, 0, "e8") == []
    assert state.reserve(7, 8, 1)[0]


def test_hello_returns_what_a_lost_answer_granted(state: ShardState, hello: HelloFactory) -> None:
    state.hello(hello(), 0)
    kept, lost = grant(state, 1), grant(state, 2)
    again, out = state.hello(hello(held=tuple(kept)), 5)
    assert (again.slots, again.deadline) == (kept, 15)
    assert out == [Free(tuple(lost))]


def test_what_was_being_saved_when_the_user_cleared_stays_away(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(hello(), 0)
    one, two = grant(state, 2)
    commit(state, one, A, 1)
    assert state.clear(8) == []
    assert state.clear(7) == [Retire((one,), MissReason.CLEARED), Spoil((two,))]
    assert commit(state, two, B, 2)[0].refused == [two]
    assert len(state.chunks) == 0


def test_a_namesake_in_another_process_does_not_inherit_slots(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(hello(), 0)
    slots = grant(state, 2)
    assert state.hello(hello(owner=OTHER, held=tuple(slots)), 1)[0].slots == []
    assert state.tick(1000) == [], "the first one may still write"
    assert state.owners() == {ENGINE, OTHER}
    state.owner_gone(ENGINE, 1000)
    assert state.tick(1002.9) == []
    assert state.tick(1003) == [Free(tuple(slots))]


def test_a_namesake_that_comes_back_has_its_slots(state: ShardState, hello: HelloFactory) -> None:
    state.hello(hello(), 0)
    slots = grant(state, 3)
    state.hello(hello(owner=OTHER), 1)
    grant_again, out = state.hello(hello(held=tuple(slots[:2])), 2)
    assert grant_again.slots == slots[:2]
    assert out == [Free(tuple(slots[2:]))]


def test_what_was_sent_before_a_hello_says_nothing_after_it(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(replace(hello(), attachment=5), 0)
    late = Exchange(engine_id="e", attachment=5, released=[0], want=1)
    state.exchange(Exchange(engine_id="e", attachment=5, want=1), 0)
    state.hello(replace(hello(), attachment=7), 1)
    again, _ = state.exchange(Exchange(engine_id="e", attachment=7, want=1), 1)
    assert again.grant is not None
    assert again.grant.slots == [1]
    late = replace(late, commits=[Commit(slot=1, key=A, nbytes=5)])
    assert state.exchange(late, 2) == (ExchangeReply(known=False), [])
    with pytest.raises(ArenaError, match="overtaken"):
        state.hello(replace(hello(), attachment=6), 2)
    assert A not in state.chunks
    assert state.tick(1000) == []


def test_saying_hello_does_not_bring_back_what_was_cleared(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(hello(), 0)
    slots = grant(state, 1)
    state.clear(7)
    assert state.hello(hello(held=tuple(slots)), 1)[0].slots == slots
    assert commit(state, slots[0], A, 2)[0].refused == slots


def test_staged_chunks_that_were_cleared_meanwhile_are_refused(state: ShardState) -> None:
    slots, _ = state.reserve(7, 8, 2)
    state.clear()
    refused, out = state.commit(7, 8, [Commit(slot=slots[0], key=A, nbytes=1)], 1)
    assert refused == [slots[0]]
    assert out == [Free((slots[0],))]
    assert state.release(7, 8, slots) == [Free((slots[1],))]


def test_recovery(state: ShardState, hello: HelloFactory) -> None:
    rows = [
        RecoveredSlot(slot=9, key=A, space=7, nbytes=8),
        RecoveredSlot(slot=0, key=B, space=7, nbytes=8),
        RecoveredSlot(slot=1, key=None, owner=ENGINE),
        RecoveredSlot(slot=2, key=None, owner=ENGINE),
        RecoveredSlot(slot=3, key=None, owner=OTHER),
        RecoveredSlot(slot=4, key=C),
        RecoveredSlot(slot=5, key=C),
    ]
    out = state.recover([8, 8, 0, 0], rows, lambda owner: owner == ENGINE, 0)
    assert out == [Retire((4,), MissReason.EVICTED), Retire((5,), MissReason.EVICTED)]
    assert len(state.chunks) == 2
    assert state.tick(3) == [Free((3,))]
    again, out = state.hello(hello(held=(2, 9, 31)), 0)
    assert again.slots == [2]
    assert out == [Free((1,))], "it does not name it: its grant or commit was lost"
    delta = state.delta()
    assert delta.begin
    assert delta.end
    assert delta.added == A + B
    state.owner_gone(ENGINE, 10)
    assert state.tick(13) == [Free((2,))]


def test_a_clear_spoils_what_waits_for_its_engine(state: ShardState, hello: HelloFactory) -> None:
    rows = [RecoveredSlot(slot=1, key=None, owner=ENGINE)]
    state.recover([8, 0, 0, 0], rows, lambda owner: True, 0)
    state.clear(7)
    assert state.hello(hello(held=(1,)), 1)[0].slots == [1]
    assert commit(state, 1, A, 2)[0].refused == [1]


def test_a_slot_of_another_size_stays_its_engines(state: ShardState, hello: HelloFactory) -> None:
    state.recover(
        [16, 0, 0, 0], [RecoveredSlot(slot=1, key=None, owner=ENGINE)], lambda owner: True, 0
    )
    again, out = state.hello(hello(held=(1,)), 1)
    assert (again.slots, out) == ([], [])
    assert state.hello(hello(), 2)[1] == [Free((1,))]


def test_a_chunk_that_fits_no_extent_is_refused_with_a_next_step(state: ShardState) -> None:
    large = Hello(engine_id="e", owner=ENGINE, space=7, model="m", slot_bytes=65, held=[])
    with pytest.raises(UnsupportedError, match="Next step"):
        state.hello(large, 0)


def test_an_extent_without_memory_is_done_without(state: ShardState, hello: HelloFactory) -> None:
    state.hello(hello(), 0)
    slots = grant(state, 3)
    assert state.extent_failed(0, 1) == frozenset(slots)
    assert grant(state, 3) == [], "no other extent is tried at once"
    assert state.tick(5.9) == []
    assert grant(state, 3) == []
    state.tick(6)
    assert grant(state, 3) == [0, 1, 2], "and nothing is lost for good"
    for _ in range(3):
        state.extent_failed(0, 7)
        state.tick(12)
        assert grant(state, 3) == [0, 1, 2]


def test_extents_that_have_memory_serve_while_there_is_no_more(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(hello(), 0)
    for i in range(8):
        commit(state, grant(state, 1)[0], bytes([i]) * 16, 0)
    assert grant(state, 1) == [8]
    state.extent_failed(1, 0)
    for i in range(8, 40):
        [slot] = grant(state, 1)
        assert slot < 8
        commit(state, slot, bytes([i]) * 16, 0)
    state.tick(5)
    assert {slot for _ in range(5) for slot in grant(state, 1)} == {8, 9, 10, 11, 12}


def test_pinned_chunks_stay_when_room_is_made_and_go_when_told(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(hello(), 0)
    for key in (A, B):
        commit(state, grant(state, 1)[0], key, 0)
    assert state.chunks.pin([A, C], True) == [A]
    for i in range(64):  # more than the arena holds
        commit(state, grant(state, 1)[0], bytes([i]) * 16, 0)
    assert B not in state.chunks
    assert A in state.chunks
    [out] = state.evict([A, A, C])
    assert isinstance(out, Retire)
    assert out.reason is MissReason.EVICTED
    assert A not in state.chunks
    assert state.chunks.pin([A], True) == []


def test_a_pin_asked_for_with_a_commit_holds(state: ShardState, hello: HelloFactory) -> None:
    state.hello(hello(), 0)
    hints = Hints(pinned=True)
    message = Commit(slot=grant(state, 1)[0], key=A, nbytes=5, hints=hints)
    state.exchange(Exchange(engine_id="e", commits=[message]), 0)
    commit(state, grant(state, 1)[0], B, 0)
    message = Commit(slot=grant(state, 1)[0], key=B, nbytes=5, hints=hints)  # known already
    state.exchange(Exchange(engine_id="e", commits=[message]), 0)
    for i in range(64):
        commit(state, grant(state, 1)[0], bytes([i]) * 16, 0)
    assert A in state.chunks
    assert B in state.chunks


def test_pinned_chunks_are_worth_most_then_the_last_used(
    state: ShardState, hello: HelloFactory
) -> None:
    state.hello(hello(), 0)
    for slot, key in zip(grant(state, 3), (A, B, C), strict=True):
        commit(state, slot, key, 0)
    assert state.chunks.by_worth() == [C, B, A]
    state.chunks.touch(B)
    state.chunks.pin([A], True)
    assert state.chunks.by_worth() == [A, B, C]
    assert state.chunks.pinned() == [A]
    assert [state.chunks.space_size_and_pin(key) for key in (A, B, b"x" * 16)] == [
        (7, 8, True),
        (7, 8, False),
        None,
    ]
