from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.cost import LinearFit, PrefillModel, SourceModel, SourceModels, choose
from lmkv_ray.cost.sources import MAX_SOURCES, STALE_SECONDS

positive = st.floats(1e-6, 1e3)


@given(st.lists(positive, min_size=1, max_size=20), st.data())
def test_choice_is_the_best_of_all(arrival: list[float], data: st.DataObject) -> None:
    n = len(arrival)
    remaining = data.draw(st.lists(positive, min_size=n + 1, max_size=n + 1))
    choice = choose(arrival, remaining)
    totals = [max([0.0, *arrival[:k]]) + remaining[k] for k in range(n + 1)]
    assert choice.total_seconds == min(totals) == totals[choice.chunks]
    assert choice.compute_seconds == remaining[0]
    assert choice.load_seconds == max([0.0, *arrival[: choice.chunks]])


def test_a_part_is_loaded_when_the_rest_would_come_too_late() -> None:
    choice = choose([0.1, 0.2, 5.0, 5.1], [4.0, 3.0, 2.0, 1.0, 0.0])
    assert choice.chunks == 2


@given(positive, positive, st.integers(0, 2**32 - 1))
def test_fit_finds_the_truth_behind_noise(a: float, b: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fit = LinearFit((1.0, 1.0))
    for x in rng.uniform(0, 20, 300):
        fit.observe((1.0, x), (a + b * x) * rng.uniform(0.9, 1.1))
    assert fit.predict((1.0, 10.0)) == pytest.approx(a + 10 * b, rel=0.1)


def test_fit_follows_a_change() -> None:
    model = SourceModel(latency=1e-3, bandwidth=1e9)
    for bandwidth in (1e9, 1e8):
        for i in range(100):
            nbytes = (1 + i % 7) << 20
            model.observe(nbytes, 1e-3 + nbytes / bandwidth)
        assert model.seconds(100 << 20) == pytest.approx(1e-3 + (100 << 20) / bandwidth, rel=0.1)


@given(st.lists(st.tuples(st.floats(-1, 1e9), st.floats(allow_nan=True, allow_infinity=True))))
def test_no_observation_makes_a_prediction_negative_or_absurd(
    seen: list[tuple[float, float]],
) -> None:
    model = SourceModel()
    for nbytes, seconds in seen:
        model.observe(nbytes, seconds)
    predicted = model.seconds([0.0, 1.0, 1e9])
    assert np.isfinite(predicted).all()
    assert (predicted >= 0).all()


def test_prefill_learns_attention_too() -> None:
    model = PrefillModel()

    def truth(new: float, past: float) -> float:
        return 2e-3 + 5e-4 * new + 2e-8 * new * (past + new / 2)

    rng = np.random.default_rng(1)
    for _ in range(200):
        new, past = int(rng.integers(64, 2048)), int(rng.integers(0, 8192))
        model.observe(new, past, truth(new, past) * rng.uniform(0.95, 1.05))
    for new, past in ((512, 0), (512, 7000), (2048, 4096)):
        assert model.seconds(new, past) == pytest.approx(truth(new, past), rel=0.1)
    assert model.seconds([0, 100], [50, 0])[0] == 0


def test_what_was_not_used_for_long_is_tried_again() -> None:
    now = [100.0]
    model = SourceModel(clock=lambda: now[0])
    assert model.is_stale()
    model.observe(1 << 20, 60.0)
    assert not model.is_stale()
    now[0] += STALE_SECONDS
    assert model.is_stale()


def test_models_are_bounded() -> None:
    models = SourceModels()
    models["kept"].observe(1 << 20, 1.0)
    for i in range(MAX_SOURCES):
        models[str(i)].seconds(0)
        models["kept"].seconds(0)
    assert len(models._models) == MAX_SOURCES
    assert models["kept"].seconds(1 << 20) > 0.1
