from __future__ import annotations

import pytest

from lmkv_ray.vllm.scheduler.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(pace: Pace, clock: Clock, request: str, new: int, past: int, seconds: float) -> None:
    """A prefill step and the decoding step behind it."""
    pace.step([(request, new, past)])
    clock.now += seconds
    pace.step([(request, 1, past + new)])
    clock.now += 0.001
    pace.step([])


def test_learns_from_prefill_steps_and_predicts_what_remains() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.remaining(1024, 0, 256, 4) == []
    for i in range(40):
        new = 128 * (1 + i % 8)
        run(pace, clock, f"r{i}", new, 0, 0.01 + 1e-3 * new)
    values = pace.remaining(1024, 0, 256, 4)
    assert values[0] == pytest.approx(1.034, rel=0.1)
    assert values[2] == pytest.approx(0.522, rel=0.15)
    assert values[4] == 0
    assert values == sorted(values, reverse=True)


def test_a_pause_between_requests_is_not_a_slow_step() -> None:
    clock = Clock()
    pace = Pace(clock)
    for i in range(10):
        pace.step([(f"r{i}", 512, 0)])
        clock.now += 60.0  # the request ended with this step; the next comes a minute later
    assert pace.model.observations == 0


def test_decoding_says_nothing() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(10):
        pace.step([(f"r{i}", 1, 500) for i in range(32)])
        clock.now += 0.02
    assert pace.model.observations == 0
