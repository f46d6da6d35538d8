"""What is told of vLLM's own prefix cache, with a pool that changes at will."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from lmkv_ray.keys import key_array, key_list
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.link import device_watch as device
from lmkv_ray.vllm.link.device_watch import DeviceWatch
from lmkv_ray.vllm.link.watch_list import Watched
from lmkv_ray.vllm.scheduler.own_cache import device_prefix
from lmkv_ray.vllm.scheduler.requests import TrackedRequest
from tests.vllm.test_identity import known_identity

FULL = Group(number=0, block_tokens=16, blocks=4, hash_tokens=16)
WINDOW = Group(number=1, block_tokens=32, blocks=1, hash_tokens=16, window=40)


class Pool:
    """As vLLM's: (hash, group) of cached blocks."""

    def __init__(self) -> None:
        self.cached: set[tuple[bytes, int]] = set()

    def get_cached_block(self, block_hash: bytes, groups: list[int]) -> list[str] | None:
        found = all((block_hash, group) in self.cached for group in groups)
        return ["block"] * len(groups) if found else None


def track(prompt: int, hashes: int, groups: tuple[Group, ...] = (FULL,)) -> TrackedRequest:
    block_hashes = [bytes([prompt]) * 24 + i.to_bytes(8, "little") for i in range(hashes)]
    request: Any = SimpleNamespace(block_hashes=block_hashes, num_computed_tokens=0)
    return TrackedRequest(request, known_identity(), groups)


class DeviceMachine(RuleBasedStateMachine):
    """Whatever happens to pool, requests and shard: in the end, what is told is so."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.watch = DeviceWatch()
        self.watch.pool = self.pool
        self.told: set[bytes] = set()
        self.chunks = {
            tracked.keys(group)[i].tobytes(): (
                tracked.request.block_hashes[group.hash_index(i)],
                group.number,
            )
            for tracked in (track(p, 16, (FULL, WINDOW)) for p in range(3))
            for group in (FULL, WINDOW)
            for i in range(len(tracked.keys(group)))
        }

    @rule(prompt=st.integers(0, 2), chunks=st.integers(1, 4))
    def compute(self, prompt: int, chunks: int) -> None:
        tracked = track(prompt, 16, (FULL, WINDOW))
        for group in (FULL, WINDOW):
            for key in tracked.keys(group)[: chunks * 64 // group.tokens]:
                self.pool.cached.add(self.chunks[key.tobytes()])
        self.watch.note(tracked.runs_to_note(chunks * 64))

    @rule(prompt=st.integers(0, 2), chunks=st.integers(0, 3))
    def evict_tail(self, prompt: int, chunks: int) -> None:
        for key in [*track(prompt, 16).keys(FULL)][chunks:]:
            self.pool.cached.discard(self.chunks[key.tobytes()])

    @rule()
    def reset(self) -> None:
        self.pool.cached.clear()

    @rule()
    def shard_forgets(self) -> None:
        self.told.clear()
        self.watch.start_over()

    @rule()
    def exchange(self) -> None:
        added, removed = self.watch.news()
        self.told |= {added[i : i + 16] for i in range(0, len(added), 16)}
        self.told -= {removed[i : i + 16] for i in range(0, len(removed), 16)}

    @rule()
    def quiet(self) -> None:
        for _ in range(len(self.chunks) // device.CHECKED + 2):
            self.exchange()
        held = {key for key, block in self.chunks.items() if block in self.pool.cached}
        assert self.told == held


TestDeviceMachine = DeviceMachine.TestCase
TestDeviceMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(device, "CHECKED", 4)


@given(
    limit=st.integers(0, 12).map(lambda n: n * 32),
    there=st.lists(st.integers(0, 24), min_size=2, max_size=2),
)
def test_the_prefix_on_the_device_is_found_by_halves(limit: int, there: list[int]) -> None:
    tracked, pool = track(1, 24), Pool()
    hashes = tracked.request.block_hashes
    for group, blocks in zip((FULL, WINDOW), there, strict=True):
        pool.cached |= {(block, group.number) for block in hashes[:blocks]}
    found = device_prefix(pool, (FULL, WINDOW), hashes, limit=limit, align=32)
    assert found == min(limit, min(there) * 16 // 32 * 32)


def test_a_reset_is_told_at_once_and_anything_less_in_turn() -> None:
    watch, pool, tracked = DeviceWatch(), Pool(), track(1, 80)
    watch.pool = pool
    pool.cached = {(block, 0) for block in tracked.request.block_hashes}
    watch.note(tracked.runs_to_note(80 * 16))
    assert len(watch.news()[0]) == 20 * 16
    last = tracked.request.block_hashes[FULL.hash_index(19)]
    pool.cached.discard((last, 0))
    gone = [watch.news()[1] for _ in range(5)]
    assert sorted(gone)[-2:] == [b"", tracked.keys(FULL)[19].tobytes()]
    pool.cached.clear()
    assert len(watch.news()[1]) == 19 * 16


def test_without_a_pool_nothing_is_known() -> None:
    watch = DeviceWatch()
    watch.note(track(1, 16).runs_to_note(256))
    assert watch.news() == (b"", b"")
    assert device_prefix(None, [FULL], [b"h"] * 16, limit=64, align=16) == 0


def test_a_copy_that_goes_while_we_look_does_not_matter() -> None:
    def changed(*_: object) -> None:
        raise RuntimeError("dictionary changed size during iteration")

    pool: Any = SimpleNamespace(get_cached_block=changed)
    assert device.is_on_device(pool, b"h", 0)


def test_everyone_has_its_turn() -> None:
    watched: Watched[int] = Watched(limit=4)
    for i in range(6):
        watched.add(bytes([i]), i)
    assert watched.excess() == [bytes([0]), bytes([1])]
    for key in watched.excess():
        assert watched.pop(key) is not None
    assert watched.pop(b"unknown") is None
    first = watched.turn(3)
    watched.pop(bytes([5]))
    assert [value for _, value in first] == [2, 3, 4]
    assert watched.turn(3) == []
    assert [value for _, value in watched.turn(9)] == [2, 3, 4]


def test_a_step_costs_the_engine_microseconds() -> None:
    """A prefill of 8,192 tokens in 256-token chunks, which is the most a step usually adds."""
    group = Group(number=0, block_tokens=16, blocks=16, hash_tokens=16)
    watch, took = DeviceWatch(), []
    for prompt in range(50):
        tracked = track(prompt, 512, (group,))
        tracked.keys(group)  # which saving needs as well
        began = time.thread_time()
        watch.note(tracked.runs_to_note(8192))
        took.append(time.thread_time() - began)
    assert statistics.median(took) < 20e-6


def test_a_request_that_was_preempted_is_noted_anew() -> None:
    """Its chunks went, were told to have gone, and are computed again."""
    watch, pool, tracked = DeviceWatch(), Pool(), track(1, 16)
    watch.pool = pool
    cached = {(block, 0) for block in tracked.request.block_hashes}
    keys = tracked.keys(FULL).tobytes()
    for _ in range(2):
        pool.cached = set(cached)
        tracked.forget_noted()
        watch.note(tracked.runs_to_note(256))
        assert watch.news()[0] == keys
        pool.cached = set()
        assert sorted(key_list(key_array(watch.news()[1]))) == sorted(key_list(key_array(keys)))
