from __future__ import annotations

import pytest

from lmkv_ray.policies import POLICIES
from lmkv_ray.simulate import (
    BELADY,
    ConstantCosts,
    Rate,
    Setup,
    Trace,
    replay,
)
from lmkv_ray.simulate.admissions import AdmissionRule
from tests.simulate.conftest import trace_of


def ideal(trace: Trace) -> int:
    """Hits of leading runs if nothing is ever evicted."""
    seen: set[bytes] = set()
    hits = 0
    for request in trace.requests:
        for key in request.keys:
            if key not in seen:
                break
            hits += 1
        seen.update(request.keys)
    return hits


@pytest.mark.parametrize("policy", [*POLICIES, BELADY])
def test_with_room_for_all_every_policy_is_ideal(policy: str, skewed: Trace) -> None:
    result = replay(skewed, Setup(memory=50_000, policy=policy))
    assert result.hits == {"memory": ideal(skewed)}


@pytest.mark.parametrize("policy", [*POLICIES, BELADY])
def test_never_better_than_ideal_and_the_same_each_time(policy: str, skewed: Trace) -> None:
    setup = Setup(memory=200, policy=policy)
    result = replay(skewed, setup)
    assert 0 < result.hits["memory"] < ideal(skewed)
    assert replay(skewed, setup) == result


def test_who_knows_the_future_hits_most(skewed: Trace) -> None:
    rates = {name: replay(skewed, Setup(memory=200, policy=name)) for name in [*POLICIES, BELADY]}
    assert max(rates, key=lambda name: rates[name].hit_rate) == BELADY


def test_only_leading_runs_are_hits() -> None:
    trace = trace_of([1, 2, 3], [9, 2, 3], [1, 2, 8, 3])
    assert replay(trace, Setup(memory=100)).hits == {"memory": 2}


def test_expected_time_to_first_token() -> None:
    costs = ConstantCosts(100.0, {"memory": Rate(bytes_per_second=10.0, latency=0.5)})
    result = replay(trace_of([1, 2], [1, 2, 3]), Setup(memory=9, bytes_per_token=1, costs=costs))
    # 20 tokens computed; then 10 computed and 20 bytes loaded.
    assert result.ttft[0] == pytest.approx((0.2 + 0.1 + 0.5 + 2.0) / 2)
    assert result.ttft_without[0] == pytest.approx((0.2 + 0.3) / 2)
    assert (result.tokens, result.tokens_hit) == (50, 20)


def test_the_last_token_is_always_computed() -> None:
    assert replay(trace_of([1], [1]), Setup(memory=9)).tokens_hit == 9


def test_a_tier_below_serves_what_memory_lost() -> None:
    there, back = [1, 2], [50, 51, 52, 53]
    trace = trace_of(there, back, there, back, there)
    setup = Setup(memory=4, disk=100, admission="all", policy="lru", bytes_per_token=1)
    result = replay(trace, setup)
    assert result.hits["disk"] > 0
    assert result.hits["memory"] + result.hits["disk"] == ideal(trace)
    assert result.written["disk"] == 6 * 10, "each chunk once"
    assert result.read["disk"] == 10 * result.hits["disk"]


@pytest.mark.parametrize(
    ("admission", "written"),
    [("all", 8), ("second_hit", 8), ("hit_in_memory", 0), ("evicted", 8)],
)
def test_admission(admission: AdmissionRule, written: int) -> None:
    there, back = [1, 2, 3, 4], [50, 51, 52, 53]
    trace = trace_of(*[there, back] * 3)
    setup = Setup(memory=4, disk=100, admission=admission, policy="lru", bytes_per_token=1)
    assert replay(trace, setup).written["disk"] == written * 10


def test_remote_below_disk() -> None:
    prompts = [[100 * i + j for j in range(4)] for i in range(20)]
    trace = trace_of(*prompts, *prompts)
    setup = Setup(memory=4, disk=16, remote=1_000, admission="all", policy="lru")
    result = replay(trace, setup)
    assert result.hits["remote"] > 60
    assert sum(result.hits.values()) == ideal(trace) == 80


def test_ttl_lets_chunks_go_that_nobody_will_ask_for() -> None:
    """One-off prompts expire before the ones that come back every ten seconds are evicted."""
    prompts = [
        [i % 10, 100 + i % 10] if i < 10 or i % 2 else [1_000 + i, 2_000 + i] for i in range(400)
    ]
    trace = trace_of(*prompts)
    free = replay(trace, Setup(memory=30, policy="lru"))
    short = replay(trace, Setup(memory=30, policy="lru", ttl=2.0))
    assert short != free


def test_a_prompt_longer_than_memory_keeps_its_head() -> None:
    long = list(range(50))
    assert replay(trace_of(long, long), Setup(memory=20)).hits["memory"] == 20


def test_progress_is_reported(skewed: Trace) -> None:
    seen: list[int] = []
    replay(skewed, Setup(memory=64), seen.append)
    assert seen == list(range(len(skewed)))
