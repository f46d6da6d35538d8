import pytest

from lmkv_ray.errors import ConfigError
from lmkv_ray.policies import LRU, Policy, make_policy


@pytest.fixture
def policy() -> Policy:
    policy = make_policy("lru")
    for key in (b"a", b"b", b"c"):
        policy.added(key)
    return policy


def test_evicts_what_was_not_used_for_longest(policy: Policy) -> None:
    policy.touched([b"a"])
    assert policy.victims(2) == [b"b", b"c"]


def test_a_prompts_tail_goes_before_its_head(policy: Policy) -> None:
    head, middle, tail = b"a", b"b", b"c"
    policy.touched([tail, middle, head])
    assert policy.victims(3) == [tail, middle, head]


def test_asking_for_victims_changes_nothing(policy: Policy) -> None:
    assert policy.victims(0) == []
    assert policy.victims(-1) == []
    assert policy.victims(9) == policy.victims(9) == [b"a", b"b", b"c"]
    assert len(policy) == 3


def test_unknown_keys_are_ignored(policy: Policy) -> None:
    policy.touched([b"x"])
    policy.removed(b"x")
    policy.removed(b"b")
    assert policy.victims(9) == [b"a", b"c"]


def test_added_again_counts_as_touch() -> None:
    policy = LRU()
    for key in (b"a", b"b", b"a"):
        policy.added(key)
    assert policy.victims(2) == [b"b", b"a"]


def test_unknown_name_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="lru"):
        make_policy("none")
