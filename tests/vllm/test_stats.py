"""Counters that are there from the start, and errors that are not silent."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import lmkv_ray.vllm
from lmkv_ray.messages import MissReason
from lmkv_ray.metrics.engine import ENGINE_COUNTERS
from lmkv_ray.vllm.engine.guard import never_raises
from lmkv_ray.vllm.engine.stats import LmkvPromMetrics, LmkvStats

Values = defaultdict[tuple[object, ...], float]


class FakeCounter:
    """In place of ``prometheus_client.Counter``."""

    made: dict[str, Values]

    def __init__(self, name: str, documentation: str, labelnames: list[str]) -> None:
        self.values = self.made[name] = defaultdict(float)

    def labels(self, *labels: object) -> FakeCounter:
        self.chosen = labels
        self.values[labels] += 0
        return self

    def inc(self, value: float) -> None:
        self.values[self.chosen] += value


@pytest.fixture
def made() -> dict[str, Values]:
    return {}


@pytest.fixture
def metrics(made: dict[str, Values], monkeypatch: pytest.MonkeyPatch) -> LmkvPromMetrics:
    def init(self: Any, _: object, types: Any, names: list[str], values: Any) -> None:
        self.per_engine_labelvalues = values
        self._counter_cls = type("Kind", (FakeCounter,), {"made": made})

    monkeypatch.setattr("lmkv_ray.vllm.engine.stats.KVConnectorPromMetrics.__init__", init)
    config: Any = None
    return LmkvPromMetrics(config, {}, ["engine"], {0: ["0"], 1: ["1"]})


def test_all_counters_are_zero_from_the_start(
    metrics: LmkvPromMetrics, made: dict[str, Values]
) -> None:
    for name in ENGINE_COUNTERS:
        assert made[f"vllm:lmkv_{name}"] == {("0",): 0, ("1",): 0}
    missed = made["vllm:lmkv_missed_tokens"]
    assert set(missed) == {(engine, reason.value) for engine in "01" for reason in MissReason}


def test_a_name_that_is_not_declared_costs_that_value_only(
    metrics: LmkvPromMetrics, made: dict[str, Values], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(100):
        metrics.observe({"of_a_newer_engine": 3, "hit_tokens": 2, "missed_tokens:tail": 1}, 1)
    assert made["vllm:lmkv_hit_tokens"]["1",] == 200
    assert made["vllm:lmkv_missed_tokens"]["1", "tail"] == 100
    assert len(caplog.records) <= 1
    metrics.observe({"hit_tokens": 2}, 77)


def test_errors_that_end_here_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    @never_raises(7)
    def fails() -> int:
        raise ValueError("of ours")

    stats = LmkvStats()
    stats.take()
    assert [fails() for _ in range(100)] == [7] * 100
    taken = stats.take()
    assert taken is not None
    assert taken.data == {"swallowed_errors": 100}
    assert stats.take() is None
    [record] = caplog.records
    assert "fails" in record.message
    assert "of ours" in caplog.text


def test_every_name_that_is_counted_is_declared() -> None:
    """Names stand as texts in the calls of ``add``; one that a direction begins is of both."""
    named = set()
    for file in Path(lmkv_ray.vllm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(ast.Attribute(_, "add"), [ast.Constant(str(name)), _]):
                    named.add(name)
                case ast.Call(
                    ast.Attribute(_, "add"),
                    [ast.JoinedStr([ast.FormattedValue(), ast.Constant(str(end))]), _],
                ):
                    named |= {"load" + end, "save" + end}
    assert named == ENGINE_COUNTERS.keys()
