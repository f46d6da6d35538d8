from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.shard import FetchPlan, plan_fetches


def test_one_node_with_everything_is_enough() -> None:
    assert plan_fetches([0, 1, 2], [("a", [0, 1]), ("b", [0, 1, 2])]) == [FetchPlan("b", (0, 1, 2))]


def test_nodes_are_combined() -> None:
    assert plan_fetches([0, 1, 2, 3], [("a", [0, 1]), ("b", [1, 2, 3])]) == [
        FetchPlan("a", (0, 1)),
        FetchPlan("b", (2, 3)),
    ]


def test_ends_at_the_first_gap_and_skips_what_is_here() -> None:
    # 1 is here already; nobody holds 3.
    assert plan_fetches([0, 2, 3, 4], [("a", [0, 2, 4])]) == [FetchPlan("a", (0, 2))]


@given(
    st.lists(st.integers(0, 12), unique=True).map(sorted),
    st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 12))),
)
def test_covers_exactly_the_reachable_run(missing: list[int], holders: dict[str, set[int]]) -> None:
    reachable = []
    for position in missing:
        if not any(position in held for held in holders.values()):
            break
        reachable.append(position)
    fetches = plan_fetches(missing, holders.items())
    assert [p for fetch in fetches for p in fetch.positions] == reachable
    assert all(set(fetch.positions) <= holders[fetch.source] for fetch in fetches)
