from __future__ import annotations

import libcachesim
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.policies import ARC, LRU, S3FIFO, Policy
from lmkv_ray.simulate import Belady


def hits(policy: Policy, capacity: int, requests: list[int], position: list[int]) -> int:
    held: set[bytes] = set()
    count = 0
    for position[0], request in enumerate(requests):
        key = request.to_bytes(16, "little")
        if key in held:
            count += 1
            policy.touched([key])
            continue
        if len(held) == capacity:
            (victim,) = policy.victims(1)
            policy.removed(victim)
            held.remove(victim)
        policy.added(key)
        held.add(key)
    return count


def oracle(capacity: int, requests: list[int]) -> int:
    cache = libcachesim.Belady(cache_size=capacity, hashpower=8)
    count = 0
    for i, number in enumerate(requests):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time = number, 1, i
        rest = requests[i + 1 :]
        later = number in rest
        request.next_access_vtime = i + 1 + rest.index(number) if later else (1 << 63) - 1
        count += cache.get(request)
    return count


@given(st.lists(st.integers(1, 25), min_size=5, max_size=150), st.integers(2, 12))
def test_hits_what_libcachesim_hits_and_nobody_hits_more(
    requests: list[int], capacity: int
) -> None:
    position = [0]
    keys = [[request.to_bytes(16, "little")] for request in requests]
    ours = hits(Belady.of(keys, lambda: position[0]), capacity, requests, position)
    assert ours == oracle(capacity, requests)
    for other in (LRU(), ARC(), S3FIFO()):
        assert hits(other, capacity, requests, position) <= ours


def test_order_and_victims_agree_and_change_nothing() -> None:
    position = [0]
    uses = [[bytes([i]) * 16] for i in (0, 1, 2, 3, 2, 0)]
    policy = Belady.of(uses, lambda: position[0])
    for position[0], (key,) in enumerate(uses[:4]):
        policy.added(key)
    names = [key[0] for key in policy.victims(9)]
    assert names[-2:] == [0, 2]  # 2 is used sooner
    assert sorted(names[:2]) == [1, 3]
    assert policy.victims(9) == list(policy.order()) == policy.victims(9)
    assert policy.victims(0) == []
    policy.removed(bytes([1]) * 16)
    assert len(policy) == 3
    assert policy.victims(1) == [bytes([3]) * 16]


@pytest.mark.parametrize("n", [1, 3])
def test_a_touch_moves_a_chunk_to_its_next_use(n: int) -> None:
    position = [0]
    a, b = bytes([1]) * 16, bytes([2]) * 16
    policy = Belady.of([[a], [b], [a], [b], [a]], lambda: position[0])
    policy.added(a)
    position[0] = 1
    policy.added(b)
    assert policy.victims(1) == [b]
    position[0] = 2
    policy.touched([a])
    assert policy.victims(n)[0] == a
