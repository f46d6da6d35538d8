"""The lanes do what they promise under every order of things that streams and events allow.

A GPU's copies are ordered by events alone. The device here does what is queued in any order that
these allow and tears copies in half; and it forgets one kind of wait at a time, to show that every
one that is forgotten ends in wrong bytes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.transfer.base import Load, Save
from tests.transfer.cases import NUM_BLOCKS, SLOTS, Case, cases, random_bytes
from tests.transfer.rig import Rig
from tests.transfer.shuffled_device import ShuffledDevice

seeds = st.integers(0, 1 << 30)


@settings(max_examples=50, deadline=None)
@given(cases(), seeds)
def test_a_load_is_what_the_arena_holds_and_comes_after_earlier_steps(
    case: Case, seed: int
) -> None:
    rig = Rig(case, ShuffledDevice(seed))
    rig.model_writes(random_bytes(seed, case.cache_bytes))  # a step that uses freed blocks still
    expected = case.loaded(rig.arena.data, rig.cache)
    rig.submit(rig.load())
    [ended] = rig.run()
    assert ended.ok
    assert ended.good == len(case.slots)
    assert ended.nbytes == sum(n for _, _, n in case.pairs())
    assert (rig.cache == expected).all()
    assert rig.nothing_is_held()


@settings(max_examples=50, deadline=None)
@given(cases(whole=True), seeds)
def test_a_save_is_what_the_step_before_it_left(case: Case, seed: int) -> None:
    rig = Rig(case, ShuffledDevice(seed))
    filled = random_bytes(seed, case.cache_bytes)
    rig.model_writes(filled)
    expected = case.saved(rig.arena.data, filled)
    rig.submit(rig.save())
    [ended] = rig.run()
    assert ended.ok
    assert (rig.arena.data == expected).all()
    assert rig.nothing_is_held()


def layers(padding: int = 0) -> ChunkLayout:
    stride = 16 + padding
    return ChunkLayout(tuple(Run(i * NUM_BLOCKS * stride, stride, 16) for i in range(2)), 2, 24)


PACKED = Case(
    layers(8),
    slot_bytes=64,
    order=np.arange(SLOTS),
    slots=np.arange(SLOTS),
    blocks=np.arange(16)[::-1].copy(),
    skip=0,
    ring_slot_bytes=64,
    direct_bytes=1 << 20,
)
"""Eight chunks, each through a slot of a ring of two."""

DIRECT = replace(PACKED, direct_bytes=0)


def one_after_the_other(case: Case, device: ShuffledDevice, *, patient: bool = True) -> bool:
    """Whether saves and loads that overlap leave the right bytes, at once when they are reported.

    Unless ``patient``, the lanes believe that every event has come to pass.
    """
    rig = Rig(case, device)
    if not patient:
        for lane in rig.lanes:
            lane._device = _Hasty(device)
    saved, loaded = (
        replace(case, slots=case.slots[:4], blocks=case.blocks[:8]),
        replace(case, slots=case.slots[4:], blocks=case.blocks[8:]),
    )
    arena = rig.arena.data.copy()
    filled = random_bytes(1, case.cache_bytes)
    rig.model_writes(filled)
    at = device.mark()
    rig.case = saved
    rig.submit(rig.save())
    rig.case = loaded
    rig.submit(rig.load())
    reports = 0
    for _ in range(100_000):
        more = rig.turn()
        for ended in rig.ended():
            reports += 1
            assert ended.ok
            if isinstance(ended.copy, Save):
                if not (rig.arena.data == saved.saved(arena, filled)).all():
                    return False
            elif any(
                (rig.cache[c : c + n] != arena[a : a + n]).any() for a, c, n in loaded.pairs()
            ):
                return False
        if not more and reports == 2:
            assert at.passed
            # And nothing came late.
            return all(
                bool((rig.cache[c : c + n] == arena[a : a + n]).all()) for a, c, n in loaded.pairs()
            )
    raise TimeoutError


class _Hasty:
    """Says that every event has come to pass."""

    def __init__(self, device: ShuffledDevice) -> None:
        self._of = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def done(self, event: object) -> bool:
        return True


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([PACKED, DIRECT]))
def test_saves_loads_and_steps_side_by_side(seed: int, case: Case) -> None:
    assert one_after_the_other(case, ShuffledDevice(seed))


PACKED_WAITS = [
    ("load copy", "load kernel"),  # the ring slot is free
    ("load kernel", "load copy"),  # the slot is filled
    ("load kernel", "compute"),  # the blocks are free
    ("save kernel", "save copy"),  # the ring slot is free
    ("save copy", "save kernel"),  # the slot is filled
    ("save kernel", "compute"),  # the blocks are filled
]
DIRECT_WAITS = [("load copy", "compute"), ("save copy", "compute")]
MUTANTS = [(PACKED, wait) for wait in PACKED_WAITS] + [(DIRECT, wait) for wait in DIRECT_WAITS]


@pytest.mark.parametrize(("case", "wait"), MUTANTS, ids=[" for ".join(w) for _, w in MUTANTS])
def test_every_wait_matters(case: Case, wait: tuple[str, str]) -> None:
    """Without it some schedule leaves wrong bytes; with it none of the same schedules does."""
    for seed in range(300):
        if not one_after_the_other(case, ShuffledDevice(seed, dropped=wait)):
            assert one_after_the_other(case, ShuffledDevice(seed))
            return
    raise AssertionError("no schedule shows that it is missing")


@pytest.mark.parametrize("case", [PACKED, DIRECT], ids=["packed", "direct"])
def test_these_are_all_the_waits(case: Case) -> None:
    device = ShuffledDevice(0)
    assert one_after_the_other(case, device)
    assert device.waits == set(PACKED_WAITS if case is PACKED else DIRECT_WAITS)


@pytest.mark.parametrize("case", [PACKED, DIRECT], ids=["packed", "direct"])
def test_reports_before_the_end_would_be_seen(case: Case) -> None:
    def wrong(seed: int) -> bool:
        return not one_after_the_other(case, ShuffledDevice(seed), patient=False)

    assert any(wrong(seed) for seed in range(100))


@settings(max_examples=60, deadline=None)
@given(cases(), seeds, st.integers(0, 30), st.integers(0, SLOTS - 1))
def test_a_chunk_lost_while_it_is_copied_is_not_good(
    case: Case, seed: int, turns: int, lost: int
) -> None:
    rig = Rig(case, ShuffledDevice(seed))
    lost %= len(case.slots)
    expected = case.loaded(rig.arena.data, rig.cache)
    rig.submit(rig.load())
    for _ in range(turns):
        rig.turn()
    over = rig.ended()
    # The shard raises the generation before it lets anybody write.
    rig.arena.generations[case.slots[lost]] += 1
    rig.arena.slot(int(case.slots[lost]))[:] = 0xEE
    [ended] = over or rig.run()
    if over or ended.good > lost:
        assert (rig.cache == expected).all()
    else:
        assert ended.good == lost
        assert not ended.ok
    assert rig.nothing_is_held()


@settings(max_examples=20, deadline=None)
@given(cases(whole=True), seeds)
def test_a_save_does_not_begin_after_its_deadline(case: Case, seed: int) -> None:
    rig = Rig(case, ShuffledDevice(seed))
    before = rig.arena.data.copy()
    late, good = rig.save(time.monotonic() - 1), rig.save()
    rig.submit(late)
    [ended] = rig.run()
    assert ended.copy is late
    assert not ended.ok
    assert (rig.arena.data == before).all()
    rig.submit(good)
    assert [ended.ok for ended in rig.run()] == [True]


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_saves_of_one_step_are_one_job_and_fail_alone(seed: int) -> None:
    rig = Rig(PACKED, ShuffledDevice(seed))
    deadline = time.monotonic() + 600
    before, cache = rig.arena.data.copy(), rig.cache.copy()

    def save(slot: int, *blocks: int, until: float = deadline) -> Save:
        return Save(1, np.array([slot]), np.array(blocks), until)

    late = save(4, 6, 7, until=time.monotonic() - 1)
    good = [save(0, 0, 1), save(3, 9, 2)]
    wrong = [save(1, 4, NUM_BLOCKS), save(2, 5)]  # no such block; not a whole chunk
    rig.submit(good[0], wrong[0], late, good[1], wrong[1])
    ended = {e.copy: e.ok for e in rig.run()}
    assert ended == {**dict.fromkeys(good, True), **dict.fromkeys([late, *wrong], False)}
    expected = before
    for copy in good:
        mine = replace(PACKED, slots=copy.slots, blocks=copy.blocks)
        expected = mine.saved(expected, cache)
    assert (rig.arena.data == expected).all()


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("case", [PACKED, DIRECT], ids=["packed", "direct"])
def test_an_error_at_any_call_fails_jobs_and_nothing_else(case: Case, dead: bool) -> None:
    counting = ShuffledDevice(7)
    rig = Rig(case, counting)
    first = counting.calls
    rig.submit(rig.load())
    rig.submit(rig.save())
    assert all(ended.ok for ended in rig.run())
    marks = 2
    for number in range(first + marks, counting.calls):
        device = ShuffledDevice(7, fail_at=number, dead=dead)
        rig = Rig(case, device)
        jobs: list[Load | Save] = [rig.load(), rig.save()]
        for job in jobs:
            rig.submit(job)
        ended = rig.run()
        assert sorted(id(e.copy) for e in ended) == sorted(map(id, jobs)), "each once"
        assert rig.health.broken
        assert rig.nothing_is_held()
        assert not any(queue.work for queue in device.queues if queue.name != "compute")
        device._fail_at = None
        rig.submit(rig.load())
        [refused] = rig.run()
        assert not refused.ok, "no further jobs"


@settings(max_examples=40, deadline=None)
@given(cases(), seeds, st.integers(0, 40))
def test_abandoned_jobs_end_when_nothing_is_under_way(case: Case, seed: int, turns: int) -> None:
    rig = Rig(case, ShuffledDevice(seed))
    jobs = [rig.load() for _ in range(3)]
    for job in jobs:
        rig.submit(job)
    for _ in range(turns):
        rig.turn()
    rig.loads.abandon()
    ended = rig.run()
    assert len(ended) == 3
    assert rig.nothing_is_held()
    assert not rig.device.step()
