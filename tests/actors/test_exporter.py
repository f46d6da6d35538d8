"""What the cache exports on the metrics ports of a real Ray cluster."""

from __future__ import annotations

import urllib.request

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from lmkv_ray.metrics.services import DIRECTORY_CHUNKS, NODE_COUNTERS, SERVICE_METRICS
from tests.actors.conftest import Nodes, eventually
from tests.node.fakes import make_keys

pytestmark = pytest.mark.ray
KEYS = make_keys(20)


def exported() -> dict[tuple[str, str], float]:
    """By metric and node or part: its value, of all nodes of the cluster."""
    values: dict[tuple[str, str], float] = {}
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=5) as answer:
                text = answer.read().decode()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    whose = sample.labels.get("node") or sample.labels.get("part")
                    if sample.name.startswith("ray_lmkv_") and whose:
                        values[sample.name, whose] = sample.value
    return values


def test_all_metrics_are_there_from_the_start_and_follow_the_shard(nodes: Nodes) -> None:
    here, there = nodes.cache.node_id[:12], nodes.other[:12]

    def complete() -> bool:
        values = exported()
        wanted = {
            (metric.exported, node)
            for metric in SERVICE_METRICS
            if metric.labels == ("node",)
            for node in (here, there)
        }
        return wanted <= values.keys() and (DIRECTORY_CHUNKS.exported, "0") in values

    eventually(complete)
    begun = exported()
    assert all(begun[metric.exported, there] == 0 for metric in NODE_COUNTERS)
    nodes.engine(nodes.cache.node_id).save(KEYS)
    eventually(lambda: exported()["ray_lmkv_committed_chunks_total", here] == len(KEYS))
    eventually(lambda: exported()["ray_lmkv_chunks", here] == len(KEYS))
    assert exported()["ray_lmkv_committed_chunks_total", there] == 0
