"""What every policy promises, alone and composed (see ``Policy``), whatever happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from lmkv_ray.hints import Hints
from lmkv_ray.policies import Clock, Pins, Policy
from tests.policies.model import CORES, WRAPPERS

KEYS = [bytes([i]) * 16 for i in range(24)]
keys = st.sampled_from(KEYS)
hints = st.builds(
    Hints,
    after=st.sampled_from([b"", *KEYS]),
    deadline=st.none() | st.floats(0, 30),
    priority=st.integers(-20, 20),
    session=st.sampled_from(["", "s", "t"]),
    space=st.integers(0, 2),
    category=st.sampled_from(["", "chat", "batch"]),
)


class Machine(RuleBasedStateMachine):
    """One policy, a twin that is never asked for victims, and the set of keys there should be."""

    wrap: Callable[[Policy, Clock], Policy]

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.known: set[bytes] = set()
        self.pinned: set[bytes] = set()

    @initialize(core=st.sampled_from(sorted(CORES)))
    def start(self, core: str) -> None:
        self.policy, self.twin = (
            type(self).wrap(CORES[core](lambda: self.now), lambda: self.now) for _ in range(2)
        )

    @rule(key=keys, hints=hints)
    def added(self, key: bytes, hints: Hints) -> None:
        for policy in (self.policy, self.twin):
            policy.added(key, hints)
        self.known.add(key)

    @rule(keys=st.lists(keys, max_size=5))
    def touched(self, keys: list[bytes]) -> None:
        for policy in (self.policy, self.twin):
            policy.touched(iter(keys))

    @rule(key=keys)
    def removed(self, key: bytes) -> None:
        for policy in (self.policy, self.twin):
            policy.removed(key)
        self.known.discard(key)
        self.pinned.discard(key)

    @rule(n=st.integers(0, 6))
    def evicted(self, n: int) -> None:
        for victim in self.policy.victims(n):
            self.removed(victim)

    @rule(key=keys, pinned=st.booleans())
    def pin(self, key: bytes, pinned: bool) -> None:
        if isinstance(self.policy, Pins) and isinstance(self.twin, Pins) and key in self.known:
            for policy in (self.policy, self.twin):
                policy.pin(key, pinned)
            (self.pinned.add if pinned else self.pinned.discard)(key)

    @rule(seconds=st.floats(0.1, 9))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def victims_are_all_that_may_be(self) -> None:
        if not hasattr(self, "policy"):
            return
        assert len(self.policy) == len(self.twin) == len(self.known)
        everything = self.policy.victims(99)
        assert len(everything) == len(set(everything))
        assert set(everything) == self.known - self.pinned
        assert self.policy.victims(0) == self.policy.victims(-1) == []
        assert self.policy.victims(3) == everything[:3], "asking changed something"

    def teardown(self) -> None:
        if hasattr(self, "policy"):
            assert self.policy.victims(99) == self.twin.victims(99), "asking changed something"


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_contracts(wrap: str) -> None:
    kind = type("Kind", (Machine,), {"wrap": staticmethod(WRAPPERS[wrap])})
    run_state_machine_as_test(
        kind, settings=settings(max_examples=40, stateful_step_count=30, deadline=None)
    )


@pytest.mark.parametrize("core", CORES)
def test_memory_of_what_is_gone_is_bounded(core: str) -> None:
    """A hundred times the capacity passes through, and what is remembered stays the same."""
    clock = [0.0]
    policy = WRAPPERS["all "](CORES[core](lambda: clock[0]), lambda: clock[0])
    sizes = []
    for i in range(1, 4_001):
        clock[0] += 1
        policy.added(
            i.to_bytes(16, "little"),
            Hints(after=(i - 1).to_bytes(16, "little"), deadline=clock[0] + 1e6, session=str(i)),
        )
        if len(policy) > 40:
            policy.removed(policy.victims(1)[0])
        if i in (1_000, 4_000):
            sizes.append(_items(policy))
    assert sizes[1] <= sizes[0] + 64 + 3_000, sizes  # sessions have a bound of their own


def _items(value: object, seen: set[int] | None = None) -> int:
    """How many values are reachable from an object of ours through containers."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, bytes, int, float, Hints)) or callable(value):
        return 0
    seen.add(id(value))
    if isinstance(value, dict):
        return len(value) + sum(_items(v, seen) for v in value.values())
    if isinstance(value, (list, tuple, set)):
        return len(value) + sum(_items(v, seen) for v in value)
    return _items(getattr(value, "__dict__", ()), seen)
