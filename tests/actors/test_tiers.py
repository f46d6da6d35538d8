"""Chunks outlive memory: disk and remote tier under real shards."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from lmkv_ray.actors import connect
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.config import load_settings
from lmkv_ray.directory import Location
from lmkv_ray.errors import ConnectError, TierError
from lmkv_ray.status import TierStatus
from lmkv_ray.tiers.remote import RemoteTier
from tests.actors.conftest import SETTINGS, Nodes, eventually
from tests.node.fakes import make_keys

pytestmark = pytest.mark.ray

KEYS = make_keys(12)


@pytest.fixture
def nodes(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """A cache with a disk tier, or a remote one; a disk directory is for one shard only."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    places: dict[str, dict[str, Any]] = {
        "disk": {"disk_dir": str(directory / "disk"), "disk_capacity": 8 << 20},
        "remote": {"remote_url": f"file://{directory}/remote"},
    }
    overrides = SETTINGS | {"ray_namespace": f"lmkv-{uuid.uuid4().hex[:6]}"} | places[request.param]
    nodes = Nodes(connect(settings=load_settings(overrides)))
    try:
        nodes.wait_for(lambda status: len(status.nodes) == 2)
        yield nodes
    finally:
        for engine in nodes.engines:
            engine.close()
        nodes.cache.stop()
        shutil.rmtree(directory)


def tier(nodes: Nodes, node_id: str) -> TierStatus:
    [status] = next(n.tiers for n in nodes.cache.status().nodes if n.node_id == node_id)
    return status


def lose_memory(nodes: Nodes, node_id: str) -> None:
    """Kill a shard while no engine keeps its arena."""
    for engine in nodes.engines:
        engine.close()
    pid = nodes.pid(node_id)
    os.kill(pid, signal.SIGKILL)
    nodes.wait_for(lambda s: any(n.node_id == node_id and n.pid != pid for n in s.nodes))


def save_twice_used(nodes: Nodes, node_id: str) -> None:
    engine = nodes.engine(node_id)
    engine.save(KEYS)
    assert engine.stage(KEYS).ready == 12  # a use
    eventually(lambda: tier(nodes, node_id).counters["stored"] == 12)


@pytest.mark.parametrize("nodes", ["disk"], indirect=True)
def test_disk_outlives_memory(nodes: Nodes) -> None:
    statuses = {n.node_id: n.tiers[0] for n in nodes.cache.status().nodes}
    refused = [node_id for node_id, status in statuses.items() if status.problem]
    [node_id] = [node_id for node_id in statuses if node_id not in refused]
    assert len(refused) == 1
    assert "in use by another shard" in str(statuses[refused[0]].problem)
    save_twice_used(nodes, node_id)
    in_memory, on_disk = Location(node_id), Location(node_id, "disk")
    asked = [*KEYS, *make_keys(1, 9)]
    eventually(lambda: nodes.cache.where(asked) == [[in_memory, on_disk]] * 12 + [[]])
    lose_memory(nodes, node_id)
    eventually(lambda: nodes.cache.where(KEYS) == [[on_disk]] * 12)
    engine = nodes.engine(node_id)
    assert engine.intact(KEYS) == 0
    eventually(lambda: engine.exchange().peers > 0)
    assert engine.stage(KEYS).ready == 12
    assert engine.intact(KEYS) == 12
    engine.call("clear", (7).to_bytes(8, "little"))
    assert engine.stage(KEYS).ready == 0


@pytest.mark.parametrize("nodes", ["remote"], indirect=True)
def test_chunks_are_pinned_evicted_and_moved_by_name(nodes: Nodes) -> None:
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS)
    assert nodes.cache.pin([*KEYS[:2], *make_keys(1, 9)]) == 2
    nodes.cache.unpin(KEYS)
    assert nodes.cache.evict(KEYS[11:]) == 1
    assert here.intact(KEYS) == 11
    assert nodes.cache.move(KEYS[:11], nodes.other[:20]) == 11
    assert here.intact(KEYS) == 0
    assert there.intact(KEYS) == 11
    assert nodes.cache.move(KEYS, nodes.other) == 11  # is there already
    assert nodes.cache.move(KEYS, "remote") == 11
    assert there.intact(KEYS) == 0
    assert here.stage(KEYS).ready == 11
    with pytest.raises(ConnectError, match="lmkv status"):
        nodes.cache.move(KEYS, "nowhere")
    with pytest.raises(TierError, match="LMKV_DISK_DIR"):
        nodes.cache.move(KEYS, "disk")


@pytest.mark.parametrize("nodes", ["remote"], indirect=True)
def test_a_clear_survives_the_remote_store_and_the_shard(nodes: Nodes) -> None:
    here, there = nodes.cache.node_id, nodes.other
    save_twice_used(nodes, here)
    store = Path(nodes.cache._settings.remote_url.removeprefix("file://"))  # type: ignore[union-attr]
    store.joinpath("clears").write_text("in the way")
    assert nodes.cache.clear() == ["remote"]
    assert "not served" in str(tier(nodes, there).problem)
    for node_id in (here, there):
        lose_memory(nodes, node_id)
    nodes.wait_for_both(lambda node: "not served" in str(node.tiers[0].problem))
    store.joinpath("clears").unlink()
    for node_id in (here, there):
        engine = nodes.engine(node_id)
        eventually(lambda engine=engine: engine.hello().peers > 0)  # type: ignore[misc]
        assert engine.stage(KEYS).ready == 0
    nodes.wait_for_both(lambda node: not node.tiers[0].problem)
    assert engine.stage(KEYS).ready == 0
    assert nodes.cache.clear() == []


@pytest.mark.parametrize("nodes", ["remote"], indirect=True)
def test_remote_is_shared_by_all_nodes_and_outlives_them(nodes: Nodes) -> None:
    here, there = nodes.cache.node_id, nodes.other
    save_twice_used(nodes, here)
    lose_memory(nodes, here)
    nodes.wait_for(lambda s: s.chunks == 0)
    for node_id in (here, there):
        engine = nodes.engine(node_id)
        eventually(lambda engine=engine: engine.hello().peers > 0)  # type: ignore[misc]
        assert engine.stage(KEYS).ready == 12
        assert engine.intact(KEYS) == 12


@pytest.mark.parametrize("nodes", ["remote"], indirect=True)
def test_what_another_cluster_clears_in_the_store_is_cleared_in_memory_too(nodes: Nodes) -> None:
    save_twice_used(nodes, nodes.cache.node_id)
    here_id = nodes.cache.node_id
    here, there = nodes.engine(here_id), nodes.engine(nodes.other)
    assert there.stage(KEYS).ready == 12
    url = nodes.cache._settings.remote_url
    assert url is not None

    async def clear() -> None:
        stranger = await RemoteTier.open(url, {}, clock=SYSTEM_CLOCK)
        await stranger.clear(None, 1)
        assert stranger.settled
        await stranger.close()

    asyncio.run(clear())
    unknown = iter(make_keys(1000, seed=5))

    def heard() -> bool:
        """Something has to be asked of the store, or nobody looks."""
        for engine in (here, there):
            engine.stage([next(unknown)])
        return here.intact(KEYS) == there.intact(KEYS) == 0

    eventually(heard)
    here.save(KEYS)
    assert here.intact(KEYS) == 12, "and it goes on"
    eventually(
        lambda: here.stage(KEYS).ready == 12 and tier(nodes, here_id).counters["stored"] == 24
    )
