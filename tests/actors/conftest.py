"""A Ray cluster of several raylets on this machine, and caches in it."""

import gc
import os
import signal
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from lmkv_ray.actors import Cache, CacheStatus, connect
from lmkv_ray.actors.launch import find
from lmkv_ray.actors.names import shard_name
from lmkv_ray.config import load_settings
from lmkv_ray.directory import MEMORY
from lmkv_ray.messages import Owner
from lmkv_ray.status import ShardStatus
from tests.node.fakes import FakeEngine

# Port 0: any free one, as there may be another cluster on this machine.
NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 80 << 20, "dashboard_port": 0}
SETTINGS: dict[str, Any] = {"capacity": 16 << 20, "reconcile_seconds": 0.2}


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """Two nodes; this process is connected to the first."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        cluster.add_node(**NODE)
        ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
        with warnings.catch_warnings():  # Ray forgets a socket when it starts a node
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(params=[{}])
def nodes(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator["Nodes"]:
    """A cache of its own, with a shard on both nodes; the parameter: settings."""
    overrides = SETTINGS | {"ray_namespace": f"lmkv-{uuid.uuid4().hex[:6]}"} | request.param
    nodes = Nodes(connect(settings=load_settings(overrides)))
    try:
        nodes.wait_for(lambda status: len(status.nodes) == 2)
        yield nodes
    finally:
        nodes.resume()
        for engine in nodes.engines:
            engine.close()
        nodes.cache.stop()


class Nodes:
    """A cache, and what tests do to it."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.namespace = cache._settings.ray_namespace
        self.engines: list[FakeEngine] = []
        self.stopped: list[int] = []

    @property
    def other(self) -> str:
        """The node this process is not connected to."""
        return next(node for node in alive_nodes() if node != self.cache.node_id)

    def shard(self, node_id: str) -> Any:
        shard = find(shard_name(node_id), self.namespace)
        assert shard is not None
        return shard

    def engine(self, node_id: str, owner: Owner | None = None) -> FakeEngine:
        shard = self.shard(node_id)

        def call(method: str, message: bytes) -> bytes:
            answer: bytes = ray.get(getattr(shard, method).remote(message), timeout=15)
            return answer

        engine = FakeEngine(call, f"engine-{len(self.engines)}", owner)
        self.engines.append(engine)
        return engine

    def wait_for(self, condition: Callable[[CacheStatus], bool], within: float = 30) -> None:
        eventually(lambda: condition(self.cache.status()), within)

    def wait_for_both(self, condition: Callable[[ShardStatus], bool]) -> None:
        """Until a condition holds of both nodes, and of no others."""
        self.wait_for(lambda s: len(s.nodes) == 2 and all(map(condition, s.nodes)))

    def wait_until_known(self, keys: list[bytes]) -> None:
        """Until the directory names a living node for each chunk: then another can fetch it.

        How many chunks it knows does not say so: those of a node that was just lost count, too.
        """

        def known() -> bool:
            alive = set(alive_nodes())
            return all(
                alive & {at.node_id for at in locations if at.tier == MEMORY}
                for locations in self.cache.where(keys)
            )

        eventually(known)

    def pid(self, node_id: str) -> int:
        return next(n.pid for n in self.cache.status().nodes if n.node_id == node_id)

    def freeze(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self.stopped.append(pid)

    def resume(self) -> None:
        while self.stopped:
            os.kill(self.stopped.pop(), signal.SIGCONT)


def alive_nodes() -> list[str]:
    """Of the Ray cluster."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def eventually(condition: Callable[[], bool], within: float = 30) -> None:
    """Wait for a condition; errors count as not yet."""
    deadline = time.monotonic() + within
    while True:
        try:
            if condition():
                return
            error: Exception = AssertionError("the condition did not come true")
        except Exception as unexpected:
            error = unexpected
        if time.monotonic() > deadline:
            raise error
        time.sleep(0.05)


def directory_pid(namespace: str, name: str = "lmkv-directory") -> int:
    """The process of a part of the directory."""
    from ray.util.state import list_actors

    (actor,) = list_actors(
        filters=[
            ("ray_namespace", "=", namespace),
            ("state", "=", "ALIVE"),
            ("name", "=", name),
        ]
    )
    assert actor.pid is not None
    return int(actor.pid)
