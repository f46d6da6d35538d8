from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv_ray.directory.handoff import RUN, Held, Order, plan_handoff

NODES = ["a", "b", "c", "d"]


def held(i: int, size: int = 10, elsewhere: str = "", space: int = 1) -> Held:
    return Held(i.to_bytes(16, "big"), space, size, elsewhere=frozenset(elsewhere))


def keys(numbers: range) -> tuple[bytes, ...]:
    return tuple(i.to_bytes(16, "big") for i in numbers)


def test_only_copies_go_to_whoever_has_most_room() -> None:
    chunks = [held(0), held(1), held(2, elsewhere="b"), held(3)]
    rooms = {"a": 100, "b": 90}
    assert plan_handoff(chunks, rooms) == [
        Order("a", 1, 10, False, keys(range(2))),
        Order("b", 1, 10, False, keys(range(3, 4))),
    ]
    assert rooms == {"a": 80, "b": 80}


def test_short_room_goes_to_the_most_important() -> None:
    chunks = [held(i) for i in range(10)]
    assert plan_handoff(chunks, {"a": 39, "b": 25}) == [
        Order("a", 1, 10, False, keys(range(3))),
        Order("b", 1, 10, False, keys(range(3, 5))),
    ]


def test_nobody_there() -> None:
    assert plan_handoff([held(0)], {}) == []


def test_copies_are_on_different_nodes() -> None:
    orders = plan_handoff([held(0, elsewhere="a")], dict.fromkeys(NODES, 100), copies=3)
    assert sorted(order.node_id for order in orders) == ["c", "d"]


chunks = st.lists(
    st.builds(
        Held,
        key=st.integers(0, 1 << 60).map(lambda i: i.to_bytes(16, "big")),
        space=st.integers(0, 1),
        slot_bytes=st.sampled_from([10, 10, 25]),
        pinned=st.booleans(),
        elsewhere=st.frozensets(st.sampled_from(NODES), max_size=2),
    ),
    unique_by=lambda held: held.key,
    max_size=150,
)
rooms = st.dictionaries(st.sampled_from(NODES), st.integers(0, 800))


@given(chunks, rooms, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_orders_are_sound_and_leave_nothing_that_fits(
    chunks: list[Held], rooms: dict[str, int], copies: int
) -> None:
    left = dict(rooms)
    orders = plan_handoff(chunks, left, copies)
    by_key = {chunk.key: chunk for chunk in chunks}
    takers: dict[bytes, list[str]] = {chunk.key: [] for chunk in chunks}
    for order in orders:
        assert 0 < len(order.keys) <= RUN
        for key in order.keys:
            chunk = by_key[key]
            assert (chunk.space, chunk.slot_bytes) == (order.space, order.slot_bytes)
            assert chunk.pinned == order.pinned
            takers[key].append(order.node_id)
    for node, room in rooms.items():
        ordered = sum(o.slot_bytes * len(o.keys) for o in orders if o.node_id == node)
        assert room - ordered == left[node] >= 0
    for key, taken in takers.items():
        chunk = by_key[key]
        assert len(set(taken)) == len(taken)
        assert not chunk.elsewhere & set(taken)
        assert len(taken) <= max(copies - len(chunk.elsewhere), 0)
        if len(taken) + len(chunk.elsewhere) < copies:
            others = set(rooms) - chunk.elsewhere - set(taken)
            assert all(left[node] < chunk.slot_bytes for node in others)
