"""Rows on vLLM's real scheduler and block manager (see ``rows_simulation``)."""

from __future__ import annotations

import pytest

from lmkv_ray.vllm.scheduler import rows
from tests.vllm.rows_simulation import Simulation

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("depth", "v2"), [(1, False), (2, False), (2, True), (3, True)])
def test_each_answer_is_that_of_its_prompt_alone(
    float32_model: str, seed: int, depth: int, v2: bool
) -> None:
    made = Simulation(float32_model, seed, depth=depth, v2=v2)
    made.run(60)
    assert made.counts["rows"]
    assert made.counts["checked"] > 20


def test_a_request_without_room_for_its_rows_is_computed_without_them(
    float32_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "HOLD_STEPS", 1)
    given_up = 0
    for seed in range(6):
        made = Simulation(float32_model, seed, depth=2, v2=True)
        made.run(60)
        given_up += made.counts["given_up"]
    assert given_up
