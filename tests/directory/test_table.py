import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv_ray.directory import ChunkTable
from lmkv_ray.directory.table import NO_NODE
from lmkv_ray.keys import KeyArray

RNG_SEED = 7


def some_keys(n: int, seed: int = RNG_SEED) -> KeyArray:
    return np.random.default_rng(seed).integers(0, 1 << 63, (n, 2), dtype=np.uint64)


def holders(table: ChunkTable, keys: KeyArray) -> list[set[int]]:
    return [set(row.tolist()) - {NO_NODE} for row in table.lookup(keys)]


def test_remembers_the_newest_four_holders() -> None:
    table, keys = ChunkTable(100), some_keys(3)
    for node in range(6):
        table.add(keys[:2], node)
    assert holders(table, keys) == [{2, 3, 4, 5}, {2, 3, 4, 5}, set()]
    assert [table.count(node) for node in range(6)] == [0, 0, 2, 2, 2, 2]


def test_repeated_keys_count_once() -> None:
    table, keys = ChunkTable(100), some_keys(2)
    table.add(np.concatenate([keys, keys]), 1)
    table.add(keys, 1)
    assert (len(table), table.count(1)) == (2, 2)
    table.remove(np.concatenate([keys, keys]), 1)
    assert (len(table), table.count(1)) == (0, 0)


def test_rows_of_forgotten_chunks_are_used_again() -> None:
    table, keys = ChunkTable(64), some_keys(64)
    table.add(keys, 1)
    for seed in range(20):
        new = some_keys(10, seed + 100)
        table.remove(keys[:10], 1)
        table.add(new, 1)
        keys = np.concatenate([keys[10:], new])
    assert table.overwritten == 0
    assert holders(table, keys) == [{1}] * 64


def test_a_full_table_forgets_the_oldest() -> None:
    table, keys = ChunkTable(64), some_keys(100)
    table.add(keys[:60], 1)
    table.add(keys[60:], 2)
    assert holders(table, keys) == [set()] * 36 + [{1}] * 24 + [{2}] * 40
    assert (len(table), table.count(1), table.count(2)) == (64, 24, 40)


def test_a_batch_larger_than_the_table() -> None:
    table, keys = ChunkTable(64), some_keys(1000)
    table.add(keys, 1)
    assert (len(table), table.count(1)) == (64, 64)
    assert holders(table, keys[-64:]) == [{1}] * 64


def test_a_new_batch_may_push_out_chunks_it_names() -> None:
    table, keys = ChunkTable(64), some_keys(100)
    table.add(keys[:64], 1)
    table.add(np.concatenate([keys[:4], keys[64:]]), 2)
    assert len(table) == 64
    assert holders(table, keys[64:]) == [{2}] * 36
    assert table.count(2) == sum(2 in row for row in holders(table, keys))


def test_dropping_a_node_forgets_what_only_it_had() -> None:
    table, keys = ChunkTable(64), some_keys(10)
    table.add(keys, 1)
    table.add(keys[:5], 2)
    table.retire(1)
    assert table.count(1) == 0
    assert holders(table, keys) == [{2}] * 5 + [set()] * 5
    assert table.is_retired(1)
    for _ in range(4):
        table.sweep(16)
    assert (len(table), table.is_retired(1)) == (5, False)


def test_a_number_of_a_node_takes_the_place_of_another() -> None:
    table, keys = ChunkTable(64), some_keys(6)
    for node in (1, 2, 3, 4):
        table.add(keys, node)
    table.add(keys[:4], 5, instead_of=2)
    assert holders(table, keys) == [{1, 3, 4, 5}] * 4 + [{1, 2, 3, 4}] * 2
    assert [table.count(n) for n in (2, 5)] == [2, 4]
    table.retire(2)
    table.add(keys, 6)  # where 2 was there is room: nobody else is forgotten
    assert holders(table, keys)[4:] == [{1, 3, 4, 6}] * 2


def test_costs_less_than_150_bytes_a_chunk() -> None:
    assert ChunkTable(1_000_000).nbytes / 1_000_000 < 150


operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "remove", "drop"]),
        st.lists(st.integers(0, 79), max_size=40),
        st.integers(0, 3),
    ),
    max_size=30,
)


@given(operations, st.sampled_from([16, 80]))
@settings(max_examples=150, deadline=None)
def test_never_claims_what_is_not_so_and_knows_all_while_there_is_room(
    operations: list[tuple[str, list[int], int]], capacity: int
) -> None:
    keys, table = some_keys(80), ChunkTable(capacity)
    truth: list[set[int]] = [set() for _ in range(80)]
    for kind, which, node in operations:
        if kind == "add":
            table.add(keys[which], node)
        elif kind == "remove":
            table.remove(keys[which], node)
        else:
            table.retire(node)
            which = list(range(80))
            while table.is_retired(node):
                table.sweep(32)
        for i in which:
            (truth[i].add if kind == "add" else truth[i].discard)(node)
        known = holders(table, keys)
        assert all(k <= t for k, t in zip(known, truth, strict=True))
        assert capacity < 80 or known == truth
        assert len(table) == sum(map(bool, known)) <= capacity
        assert [table.count(n) for n in range(4)] == [sum(n in k for k in known) for n in range(4)]


def test_a_full_table_gives_no_row_to_two_keys_of_a_batch() -> None:
    """Free rows are taken first; then the hand may come to the same ones."""
    keys = np.random.default_rng(0).integers(1, 1 << 63, (1050, 2), dtype=np.uint64)
    table = ChunkTable(1000)
    table.add(keys[:1000], 0)
    table.add(keys[1000:1010], 0)  # the hand is at row 10
    table.remove(keys[20:30], 0)
    table.add(keys[1010:], 1)
    assert (table.lookup(keys[1010:]) == 1).any(axis=1).all()
    assert (len(table), len(table._index)) == (1000, 1000)
