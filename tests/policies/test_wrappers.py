"""What each wrapper is for, over every core."""

from __future__ import annotations

import pytest

from lmkv_ray.hints import Hints
from lmkv_ray.policies import LRU, POLICIES, Expiry, Pins, Policy, Prefix, Quota, make_policy
from tests.policies.model import CORES


def key(name: str) -> bytes:
    return name.encode().ljust(16)


def names(victims: list[bytes]) -> str:
    return "".join(victim.decode().strip() for victim in victims)


@pytest.fixture(params=sorted(CORES))
def core(request: pytest.FixtureRequest) -> Policy:
    return CORES[request.param](lambda: 0.0)


def prompt(policy: Policy, chunks: str, after: str = "") -> None:
    """Chunks of one prompt, head first."""
    for name in chunks:
        policy.added(key(name), Hints(after=key(after) if after else b""))
        after = name


class TestPrefix:
    def test_the_tail_goes_before_the_head(self, core: Policy) -> None:
        policy = Prefix(core)
        prompt(policy, "abcd")
        assert names(policy.victims(9)) == "dcba"

    def test_all_branches_go_before_the_root(self, core: Policy) -> None:
        policy = Prefix(core)
        prompt(policy, "abc")
        prompt(policy, "de", after="a")
        order = names(policy.victims(9))
        assert sorted(order) == list("abcde")
        assert order[-1] == "a"
        assert order.index("c") < order.index("b")
        assert order.index("e") < order.index("d")

    def test_an_orphan_is_the_best_victim_with_all_that_follows(self, core: Policy) -> None:
        policy = Prefix(core)
        policy.added(key("x"))
        prompt(policy, "abcd")
        policy.touched([key(name) for name in "dcba"])
        policy.removed(key("b"))
        assert names(policy.victims(2)) == "dc"

    def test_a_head_that_comes_back_adopts_its_followers(self) -> None:
        policy = Prefix(LRU())
        prompt(policy, "ab")
        policy.added(key("x"))
        policy.touched([key("b"), key("a")])
        policy.removed(key("a"))
        assert names(policy.victims(1)) == "b"
        policy.added(key("a"))
        assert names(policy.victims(3)) == "xba"

    def test_the_tail_may_be_added_first(self, core: Policy) -> None:
        policy = Prefix(core)
        policy.added(key("b"), Hints(after=key("a")))
        policy.added(key("a"))
        assert names(policy.victims(2)) == "ba"

    def test_a_circle_of_wrong_hints_is_survived(self, core: Policy) -> None:
        policy = Prefix(core)
        policy.added(key("a"), Hints(after=key("b")))
        policy.added(key("b"), Hints(after=key("a")))
        policy.added(key("c"), Hints(after=key("c")))
        assert sorted(names(policy.victims(9))) == ["a", "b", "c"]


class TestExpiry:
    def test_what_is_past_its_deadline_goes_first(self, core: Policy) -> None:
        now = [0.0]
        policy = Expiry(core, lambda: now[0])
        policy.added(key("a"))
        policy.added(key("l"), Hints(deadline=20.0))
        policy.added(key("s"), Hints(deadline=10.0))
        policy.touched([key("l"), key("s")])
        assert policy.victims(3) == core.victims(3)
        now[0] = 10.0
        assert names(policy.victims(1)) == "s"
        now[0] = 25.0
        assert names(policy.victims(9)) == "sla"

    def test_stored_again_is_renewed(self, core: Policy) -> None:
        now = [0.0]
        policy = Expiry(core, lambda: now[0])
        policy.added(key("a"), Hints(deadline=5.0))
        policy.added(key("b"))
        policy.added(key("a"), Hints(deadline=50.0))
        now[0] = 10.0
        assert policy.victims(2) == core.victims(2)

    def test_what_is_used_after_its_deadline_has_none(self) -> None:
        now = [0.0]
        policy = Expiry(LRU(), lambda: now[0])
        policy.added(key("p"), Hints(deadline=0.0))  # one request's word about a prompt of all
        policy.added(key("a"))
        policy.added(key("b"), Hints(deadline=50.0))
        policy.touched([key("b")])
        now[0] = 10.0
        assert names(policy.victims(3)) == "pab"
        policy.touched([key("p")])
        assert names(policy.victims(3)) == "abp"
        now[0] = 60.0
        assert names(policy.victims(3)) == "bap"


class TestQuota:
    def test_a_flood_of_one_tenant_leaves_the_others_their_share(self, core: Policy) -> None:
        policy = Quota(core, share=0.5)
        for i in range(40):
            policy.added(key(f"quiet{i}"), Hints(space=1))
        for i in range(1_000):
            policy.added(key(f"flood{i}"), Hints(space=2))
            if len(policy) > 100:
                (victim,) = policy.victims(1)
                assert victim.startswith(b"flood")
                policy.removed(victim)

    def test_memory_that_nobody_wants_may_be_used(self, core: Policy) -> None:
        policy = Quota(core, share=0.1)
        for i in range(50):
            policy.added(key(str(i)), Hints(space=1))
        assert policy.victims(50) == core.victims(50)

    def test_the_one_furthest_over_gives_its_oldest(self) -> None:
        policy = Quota(LRU(), share=0.25)
        for name, space in [("x", 3), ("a", 1), ("b", 1), ("c", 1), *((n, 2) for n in "defgh")]:
            policy.added(key(name), Hints(space=space))
        policy.touched([key("d")])
        assert names(policy.victims(5)) == "efgax"


class TestPins:
    def test_pinned_are_never_victims(self, core: Policy) -> None:
        policy = Pins(core)
        prompt(policy, "abc")
        policy.pin(key("b"), True)
        assert sorted(names(policy.victims(9))) == ["a", "c"]
        policy.pin(key("b"), False)
        assert sorted(names(policy.victims(9))) == ["a", "b", "c"]

    def test_a_pin_ends_with_its_chunk(self, core: Policy) -> None:
        policy = Pins(core)
        policy.added(key("a"))
        policy.pin(key("a"), True)
        policy.removed(key("a"))
        policy.added(key("a"))
        assert names(policy.victims(9)) == "a"


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_made_by_name_has_every_wrapper(name: str) -> None:
    now = [0.0]
    policy = make_policy(name, clock=lambda: now[0], tenant_share=0.5)
    policy.added(key("o"), Hints(space=2))
    policy.added(key("t"), Hints(space=1, deadline=1.0))
    prompt(policy, "abcd")
    assert names(policy.victims(1)) == "d"  # over its share, and a tail
    now[0] = 2.0
    assert names(policy.victims(1)) == "t"
