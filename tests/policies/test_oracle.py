"""Policies hit exactly what an independent implementation hits."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import libcachesim
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.policies import ARC, LRU, S3FIFO, Policy

PAIRS: dict[str, tuple[Callable[[int], Policy], type[libcachesim.cache.CacheBase]]] = {
    "lru": (lambda _: LRU(), libcachesim.LRU),
    "arc": (ARC, libcachesim.ARC),
    "s3fifo": (S3FIFO, libcachesim.S3FIFO),
}


def hits(policy: Policy, capacity: int, requests: Sequence[int]) -> list[bool]:
    """One victim after each chunk that was one too many: what the papers' caches do."""
    held: set[bytes] = set()
    result = []
    for request in requests:
        key = request.to_bytes(16, "little")
        result.append(key in held)
        if key in held:
            policy.touched([key])
            continue
        policy.added(key)
        held.add(key)
        if len(held) > capacity:
            (victim,) = policy.victims(1)
            policy.removed(victim)
            held.remove(victim)
    return result


def oracle_hits(
    make: type[libcachesim.cache.CacheBase], capacity: int, requests: Sequence[int]
) -> list[bool]:
    cache = make(cache_size=capacity, hashpower=10)
    result = []
    for request in requests:
        wanted = libcachesim.Request()
        wanted.obj_id, wanted.obj_size = request, 1
        result.append(cache.get(wanted))
    return result


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("capacity", [20, 50, 97, 300])
def test_skewed_requests(name: str, capacity: int) -> None:
    """Popular ones, scans, and a change of what is popular."""
    rng = random.Random(capacity)
    popular = [int(rng.paretovariate(0.6)) % 700 for _ in range(6_000)]
    scan = list(range(1_000, 1_000 + 2 * capacity))
    other = [2_000 + int(rng.paretovariate(0.8)) % 700 for _ in range(6_000)]
    requests = [*popular, *scan, *scan, *other, *popular[:3_000]]
    ours, theirs = PAIRS[name]
    expected = oracle_hits(theirs, capacity, requests)
    assert 0 < sum(expected) < len(requests)
    assert hits(ours(capacity), capacity, requests) == expected


@pytest.mark.parametrize("name", PAIRS)
@given(data=st.data())
def test_any_requests(name: str, data: st.DataObject) -> None:
    # libcachesim's S3-FIFO needs a small queue of two.
    capacity = data.draw(st.integers(20 if name == "s3fifo" else 2, 30))
    requests = data.draw(st.lists(st.integers(1, 2 * capacity), min_size=capacity, max_size=200))
    ours, theirs = PAIRS[name]
    expected = oracle_hits(theirs, capacity, requests)
    assert hits(ours(capacity), capacity, requests) == expected
