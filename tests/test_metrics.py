"""Each metric is declared once, and everything that a service counts is a metric."""

from __future__ import annotations

import dataclasses
import re

import pytest

from lmkv_ray.metrics.services import (
    NODE_COUNTERS,
    PROBLEM,
    SERVICE_METRICS,
    TIER_COUNTERS,
    TIER_PROBLEM,
    MetricKind,
    node_samples,
    part_samples,
)
from lmkv_ray.node.staging import StageCounters
from lmkv_ray.shard.values import Counters
from lmkv_ray.status import DirectoryStatus, EngineStatus, ShardStatus, TierStatus
from lmkv_ray.tiers.counters import DiskCounters, RemoteCounters

SHARD_EXTRAS = {"missed", "policy_errors"}
"""What ``Shard.counters`` adds to ``Counters``."""


def fields(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def test_everything_that_a_shard_counts_is_a_metric() -> None:
    assert {m.counter for m in NODE_COUNTERS} == fields(Counters, StageCounters) | SHARD_EXTRAS


def test_everything_that_a_tier_counts_is_a_metric() -> None:
    assert {m.counter for m in TIER_COUNTERS} == fields(DiskCounters, RemoteCounters)


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.name for metric in SERVICE_METRICS]
    assert len(set(names)) == len(names)
    for metric in SERVICE_METRICS:
        assert re.fullmatch("lmkv_[a-z]+(_[a-z]+)*", metric.name)
        assert not metric.name.endswith("_total")  # Ray adds it to counters
        assert metric.text.endswith(".")
        assert (metric.counter != "") == (metric.kind is MetricKind.COUNTER)


STATUS = ShardStatus(
    node_id="0123456789abcdef",
    pid=1,
    capacity=100,
    chunks=3,
    nbytes=30,
    engines=[EngineStatus("e", "m", slots=2, device_chunks=5), EngineStatus("f", "m", slots=4)],
    counters={"evicted": 7},
    tiers=[TierStatus("remote", -1, -1, -1, "It is away.", {"stored": 2, "asked": 9})],
)


def test_samples_of_a_node() -> None:
    samples = {(s.metric.name, *s.labels): s.value for s in node_samples(STATUS)}
    node = "0123456789ab"
    assert samples["lmkv_granted_slots", node] == 6
    assert samples["lmkv_device_chunks", node] == 5
    assert samples["lmkv_evicted_chunks", node] == 7
    assert samples["lmkv_staged_chunks", node] == 0
    assert samples[PROBLEM.name, node] == 0
    assert samples[TIER_PROBLEM.name, node, "remote"] == 1
    assert samples["lmkv_tier_asked_chunks", node, "remote"] == 9
    assert ("lmkv_tier_chunks", node, "remote") not in samples  # the store does not say
    assert ("lmkv_tier_evicted_chunks", node, "remote") not in samples


@pytest.mark.parametrize("status", [STATUS, ShardStatus("n", 1, problem="No memory.")])
def test_each_declared_metric_of_a_node_has_one_value(status: ShardStatus) -> None:
    samples = list(node_samples(status))
    assert len({(s.metric.name, s.labels) for s in samples}) == len(samples)
    plain = [m for m in SERVICE_METRICS if m.labels == ("node",)]
    assert [s.metric for s in samples if s.metric.labels == ("node",)] == plain
    assert all(len(s.labels) == len(s.metric.labels) for s in samples)


def test_samples_of_the_directory() -> None:
    status = DirectoryStatus(part=1, nodes=3, unsynced=1, chunks=10, capacity=20)
    samples = {s.metric.name: s.value for s in part_samples(status)}
    assert samples == {
        "lmkv_directory_chunks": 10,
        "lmkv_directory_capacity_chunks": 20,
        "lmkv_directory_nodes": 3,
        "lmkv_directory_unsynced_nodes": 1,
    }
