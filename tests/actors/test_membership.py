"""Nodes that come and go on purpose."""

import time

import pytest
import ray
from ray.cluster_utils import Cluster

from lmkv_ray.actors.launch import actor_names
from lmkv_ray.actors.names import shard_name
from lmkv_ray.actors.shard import start_shard
from lmkv_ray.errors import ConnectError
from tests.actors.conftest import NODE, Nodes, alive_nodes, eventually
from tests.node.fakes import make_keys

pytestmark = pytest.mark.ray

KEYS = make_keys(30)


def test_a_node_that_is_drained_hands_over_what_only_it_holds(
    cluster: Cluster, nodes: Nodes
) -> None:
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS[:10])
    nodes.wait_until_known(KEYS[:10])
    there.stage(KEYS[:6])
    there.save(KEYS[10:])
    nodes.wait_for(lambda s: s.directory_chunks == 30 and s.chunks == 36)
    eventually(lambda: nodes.cache.drain(nodes.cache.node_id).left == 0)
    # It may end now, and nobody has to wait for the directory to hear of the copies.
    assert all(
        len({at.node_id for at in locations}) == 2 for locations in nodes.cache.where(KEYS[:10])
    )
    nodes.wait_for(lambda status: status.chunks == 40)
    assert there.intact(KEYS[:10]) == 10
    assert here.intact(KEYS[:10]) == 10  # it goes on serving
    assert {n.node_id: n.draining for n in nodes.cache.status().nodes} == {
        nodes.cache.node_id: True,
        nodes.other: False,
    }
    # Nothing is given to a node that leaves.
    drained = nodes.cache.drain(nodes.other[:20], seconds=2)
    assert (drained.copied, drained.left) == (0, 30)


def test_a_node_that_ray_drains_leaves_its_chunks(cluster: Cluster, nodes: Nodes) -> None:
    from ray.core.generated import autoscaler_pb2

    third = cluster.add_node(**NODE)
    nodes.wait_for(lambda status: len(status.nodes) == 3)
    engine = nodes.engine(third.node_id)
    engine.save(KEYS)
    nodes.wait_until_known(KEYS)
    gcs = ray._raylet.GcsClient(address=cluster.address)  # type: ignore[attr-defined]
    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
    ends = int(1000 * (time.time() + 120))
    assert gcs.drain_node(third.node_id, reason, "spot", ends)[0]
    # Ray ends a node on which nothing runs any more: the shard has gone when it was done.
    eventually(lambda: third.node_id not in alive_nodes())
    nodes.wait_for(lambda s: len(s.nodes) == 2 and s.chunks == 30)
    nodes.wait_until_known(KEYS)
    here = nodes.engine(nodes.cache.node_id)
    assert here.stage(KEYS).ready == 30
    assert here.intact(KEYS) == 30
    cluster.remove_node(third)


def test_a_node_that_is_not_there_cannot_be_drained(nodes: Nodes) -> None:
    with pytest.raises(ConnectError, match="0 nodes of the cache"):
        nodes.cache.drain("nowhere")


@pytest.mark.parametrize("nodes", [{"replicas": 2}], indirect=True, ids=["replicas"])
def test_what_is_hit_often_is_copied(nodes: Nodes) -> None:
    here = nodes.engine(nodes.cache.node_id)
    here.save(KEYS)
    nodes.wait_until_known(KEYS)

    def copied() -> bool:
        for _ in range(2):
            here.exchange(touched=KEYS[:5])
        return nodes.cache.status().chunks == 35

    eventually(copied)
    assert nodes.engine(nodes.other).intact(KEYS[:5]) == 5


IDLE = {"release_idle_seconds": 1.0}


@pytest.mark.parametrize("nodes", [IDLE], indirect=True, ids=["idle"])
def test_a_node_without_engines_is_given_back_until_one_comes(nodes: Nodes) -> None:
    nodes.wait_for(lambda s: [n.node_id for n in s.nodes] == [nodes.cache.node_id])  # the head
    eventually(lambda: shard_name(nodes.other) not in actor_names(nodes.namespace))

    def attached() -> bool:
        # It may be given back again before the engine has said hello: like an engine, start anew.
        start_shard(nodes.cache._settings, nodes.other)
        return nodes.engine(nodes.other).save(KEYS).refused == []

    eventually(attached)
    nodes.wait_until_known(KEYS)
    nodes.wait_for(lambda status: len(status.nodes) == 2)
