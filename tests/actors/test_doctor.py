"""The doctor's own chunk goes through every tier and every node of a real cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from lmkv_ray.actors import connect
from lmkv_ray.config import load_settings
from lmkv_ray.doctor.cluster import cluster_findings
from lmkv_ray.doctor.finding import Level
from lmkv_ray.doctor.trial import Trial
from tests.actors.conftest import SETTINGS, Nodes

pytestmark = pytest.mark.ray


def test_every_node_and_every_tier(cluster: Cluster, tmp_path: Path) -> None:
    settings = SETTINGS | {
        "ray_namespace": "lmkv-doctor",
        "remote_url": f"file://{tmp_path}/remote",
    }
    nodes = Nodes(connect(settings=load_settings(settings)))
    try:
        nodes.wait_for_both(lambda node: not node.problem)
        status = nodes.cache.status()
        found = list(Trial(nodes.cache).run(status))
        assert [f.level for f in found] == [Level.GOOD] * 3, found
        assert [f.about.split()[0] for f in found] == ["memory", "node", "remote"]
        assert nodes.cache.status().chunks == 0
        assert {f.level for f in cluster_findings(status)} == {Level.GOOD}
        assert all(node.host and node.version and node.wall for node in status.nodes)
    finally:
        nodes.cache.stop()


def test_a_node_that_hangs_is_found(nodes: Nodes) -> None:
    status = nodes.cache.status()
    trial = Trial(nodes.cache)
    nodes.freeze(nodes.pid(nodes.other))
    memory, node = trial.run(status)
    assert memory.level is Level.GOOD
    assert node.level is Level.BAD
    assert node.next_step
