"""The cache in a Ray cluster of several nodes."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from msgspec import structs
from ray.cluster_utils import Cluster

from lmkv_ray.actors import connect
from lmkv_ray.actors.launch import actor_names
from lmkv_ray.config import load_settings
from lmkv_ray.errors import ArenaError, ConnectError
from lmkv_ray.host import host_id
from lmkv_ray.keys import key_array
from lmkv_ray.messages import MissReason, Stage, StageReply, decode, encode
from tests.actors.conftest import NODE, SETTINGS, Nodes, directory_pid, eventually
from tests.node.fakes import make_keys

pytestmark = pytest.mark.ray

KEYS = make_keys(30)
TRANSPORTS = [{"transport": name} for name in ("shared_memory", "nixl", "object_store")]
all_transports = pytest.mark.parametrize(
    "nodes", TRANSPORTS, indirect=True, ids=lambda value: value["transport"]
)


@all_transports
def test_chunks_reach_the_other_node(nodes: Nodes) -> None:
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS)
    nodes.wait_until_known(KEYS)
    reply = there.stage(KEYS)
    assert (reply.ready, reply.reason) == (30, None)
    assert there.intact(KEYS) == 30
    nodes.wait_for(lambda s: [n.chunks for n in s.nodes] == [30, 30] and s.directory_chunks == 30)
    eventually(lambda: here.exchange().peers == 1)
    assert there.stage([*KEYS, *make_keys(1, 1)]).reason == MissReason.NEVER_STORED


def test_a_stage_says_where_the_chunks_are_if_it_is_asked(nodes: Nodes) -> None:
    """For engines with workers on that node, and a scheduler on another."""
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS)
    nodes.wait_until_known(KEYS)
    keys = [*KEYS, *make_keys(1, 1)]
    stage = decode(there.stage_message(keys), Stage)
    reply = decode(there.call("stage", encode(structs.replace(stage, locate=True))), StageReply)
    assert there.reader is not None
    hits = there.reader.lookup(key_array(keys))
    assert (reply.ready, reply.reason) == (30, MissReason.NEVER_STORED)
    assert reply.arena_id == there.reader.arena_id
    assert reply.slots == hits.slots.tolist()
    assert reply.slots[30] == -1
    assert reply.generations == hits.generations.tolist()


def test_a_shard_is_found_by_its_host(nodes: Nodes) -> None:
    known = [nodes.shard(nodes.cache.node_id), nodes.shard(nodes.other)]
    assert nodes.cache.shard_of(host_id()) in known
    assert nodes.cache.shard_of("elsewhere") is None


def test_connecting_again_finds_the_same(nodes: Nodes) -> None:
    again = connect(settings=nodes.cache._settings)
    assert again.shard == nodes.cache.shard
    assert again.directory == nodes.cache.directory
    assert len(actor_names(nodes.namespace)) == 3


def test_clear_reaches_every_node(nodes: Nodes) -> None:
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS)
    nodes.wait_until_known(KEYS)
    there.stage(KEYS)
    there.call("clear", (8).to_bytes(8, "little"))
    assert here.intact(KEYS) == there.intact(KEYS) == 30
    there.call("clear", (7).to_bytes(8, "little"))
    assert here.intact(KEYS) == there.intact(KEYS) == 0
    assert there.stage(KEYS).reason == MissReason.CLEARED
    here.save(KEYS)
    nodes.cache.clear()
    assert here.intact(KEYS) == 0


def test_a_killed_shard_keeps_its_chunks(nodes: Nodes) -> None:
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS)
    here.exchange(want=3)
    assert here.reader is not None
    arena_id, held = here.reader.header.arena_id, list(here.slots)
    os.kill(nodes.pid(nodes.cache.node_id), signal.SIGKILL)
    assert here.intact(KEYS) == 30  # no shard is needed for that
    eventually(lambda: here.exchange().known is False)
    welcome = here.hello()
    assert welcome.arena_id == arena_id
    assert welcome.grant.slots == held
    new = make_keys(3, 1)
    assert here.save(new).refused == []
    assert here.intact(KEYS) == 30
    nodes.wait_until_known([*KEYS, *new])
    assert there.stage(KEYS).ready == 30


def test_a_killed_directory_is_rebuilt_from_the_shards(nodes: Nodes) -> None:
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS)
    nodes.wait_until_known(KEYS)
    os.kill(directory_pid(nodes.namespace), signal.SIGKILL)
    start = time.monotonic()
    reply = there.stage(KEYS, within=1)
    assert time.monotonic() - start < 5
    assert reply.reason is None or reply.ready == 0
    nodes.wait_until_known(KEYS)
    eventually(lambda: there.stage(KEYS).ready == 30)  # its shard, too, has to find the new one


@pytest.mark.parametrize("nodes", [{"directory_parts": 2}], indirect=True, ids=["2 parts"])
def test_a_directory_in_parts_is_rebuilt_from_the_shards(nodes: Nodes) -> None:
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS)
    nodes.wait_until_known(KEYS)
    parts = nodes.cache.status().directory
    assert [part.part for part in parts] == [0, 1]
    assert all(part.chunks > 5 for part in parts)
    assert there.stage(KEYS[:20]).ready == 20
    for name in ("lmkv-directory", "lmkv-directory-1"):
        os.kill(directory_pid(nodes.namespace, name), signal.SIGKILL)
    nodes.wait_for(lambda s: [part.unsynced for part in s.directory] == [0, 0])
    nodes.wait_until_known(KEYS)
    eventually(lambda: there.stage(KEYS).ready == 30)
    assert there.intact(KEYS) == 30


def test_a_frozen_directory_delays_nobody(nodes: Nodes) -> None:
    here = nodes.engine(nodes.cache.node_id)
    nodes.freeze(directory_pid(nodes.namespace))
    start = time.monotonic()
    assert here.save(KEYS).refused == []
    assert here.intact(KEYS) == 30
    assert here.stage(make_keys(4, 1), within=0.5).reason == MissReason.STAGE_TIMEOUT
    assert time.monotonic() - start < 5
    eventually(lambda: here.exchange().peers == 0)
    nodes.resume()
    nodes.wait_until_known(KEYS)


def test_a_frozen_shard_delays_nobody(nodes: Nodes) -> None:
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS)
    nodes.wait_until_known(KEYS)
    pid = nodes.pid(nodes.cache.node_id)
    nodes.freeze(pid)
    assert here.intact(KEYS) == 30
    start = time.monotonic()
    reply = there.stage(KEYS, within=1)  # one-sided if its address is known, else too late
    assert reply.ready == 30 or reply.reason is not None
    assert nodes.cache.status().silent == [nodes.cache.node_id]
    nodes.cache.clear()
    assert time.monotonic() - start < 10
    assert here.intact(KEYS) == 30
    assert there.intact(KEYS) == 0
    # It has missed a clear: nobody is sent to it before it catches up, whoever dies meanwhile.
    assert there.stage(KEYS, within=1).ready == 0
    os.kill(directory_pid(nodes.namespace), signal.SIGKILL)
    nodes.wait_for(lambda status: status.directory[0].nodes == 1)
    assert there.stage(KEYS, within=1).ready == 0
    nodes.resume()
    eventually(lambda: here.intact(KEYS) == 0)


def test_slots_end_with_their_process(nodes: Nodes) -> None:
    code = (
        "import ray, sys; from tests.node.fakes import FakeEngine;"
        "ray.init(sys.argv[1], namespace=sys.argv[2], log_to_driver=False);"
        "shard = ray.get_actor(sys.argv[3]);"
        "FakeEngine(lambda m, b: ray.get(getattr(shard, m).remote(b))).exchange(want=9);"
        "print('ready', flush=True); input()"
    )
    address = ray.get_runtime_context().gcs_address
    name = f"lmkv-shard-{nodes.cache.node_id}"
    command = [sys.executable, "-c", code, address, nodes.namespace, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"ready\n"
        assert nodes.cache.status().engines == 1
        engine.kill()
    nodes.wait_for(lambda status: status.engines == 0)


def test_nodes_come_and_go(cluster: Cluster, nodes: Nodes) -> None:
    third = cluster.add_node(**NODE)
    nodes.wait_for(lambda status: len(status.nodes) == 3)
    engine = nodes.engine(third.node_id)
    engine.save(KEYS)
    nodes.wait_until_known(KEYS)
    cluster.remove_node(third, allow_graceful=False)
    nodes.wait_for(lambda status: len(status.nodes) == 2 and status.directory_chunks == 0)
    eventually(lambda: len(actor_names(nodes.namespace)) == 3)  # it is ended after that


def test_each_node_has_the_capacity_of_its_own_environment(cluster: Cluster, nodes: Nodes) -> None:
    """As on a head that is small beside its workers (cluster_configs)."""
    wanted = {nodes.cache.node_id: 16, nodes.other: 16}  # MiB
    third = cluster.add_node(**NODE, env_vars={"LMKV_CAPACITY": "32MiB", "LMKV_REPLICAS": "2"})
    try:
        wanted[third.node_id] = 32
        nodes.wait_for(
            lambda status: {value.node_id: value.capacity >> 20 for value in status.nodes} == wanted
        )
    finally:
        cluster.remove_node(third, allow_graceful=False)
        nodes.wait_for(lambda status: len(status.nodes) == 2)


def test_stop_leaves_nothing(cluster: Cluster) -> None:
    settings = load_settings(SETTINGS | {"ray_namespace": "lmkv-stop"})
    with ThreadPoolExecutor(6) as pool:  # all start it at once
        caches = list(pool.map(lambda _: connect(settings=settings), range(6)))
    cache = caches[0]
    assert all(other.shard == cache.shard for other in caches)
    eventually(lambda: len(cache.status().nodes) == 2)
    pids = [node.pid for node in cache.status().nodes]
    assert all("16 MiB of /dev/shm: LMKV_CAP" in node.taken for node in cache.status().nodes)
    cache.stop()
    assert actor_names("lmkv-stop") == []
    with pytest.raises(ConnectError, match="connect again"):
        cache.status()
    with pytest.raises(ConnectError, match="Next step"):
        connect(settings=settings, start=False)
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))  # noqa: PTH110
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("lmkv")]  # noqa: PTH208
    cache.stop()


def test_unusable_shared_memory_is_one_clear_error(cluster: Cluster) -> None:
    settings = load_settings(SETTINGS | {"ray_namespace": "lmkv-noshm", "arena_dir": "/nowhere"})
    with pytest.raises(ArenaError, match="LMKV_ARENA_DIR"):
        connect(settings=settings)
    with pytest.raises(ArenaError, match="lmkv stop"):
        connect(settings=settings)
    cache = connect(settings=settings, start=False)
    Nodes(cache).wait_for_both(lambda node: node.problem is not None)
    cache.stop()
    assert actor_names("lmkv-noshm") == []


def test_another_cluster_on_this_machine_is_another_cache(nodes: Nodes) -> None:
    code = """
import ray, lmkv_ray.actors, lmkv_ray.config, sys
ray.init("local", include_dashboard=False, configure_logging=False, log_to_driver=False)
settings = lmkv_ray.config.load_settings({"ray_namespace": sys.argv[1], "capacity": 4 << 20})
cache = lmkv_ray.actors.connect(settings=settings)
while not cache.status().nodes: pass
print([(node.node_id, node.chunks) for node in cache.status().nodes])
assert cache.shard is not None
"""
    nodes.engine(nodes.cache.node_id).save(KEYS)
    command = [sys.executable, "-c", code, nodes.namespace]
    found = subprocess.run(command, stdout=subprocess.PIPE, timeout=90, check=True).stdout.decode()
    assert found.count("', 0)") == 1
    assert nodes.cache.node_id not in found
    nodes.wait_for(lambda status: len(status.nodes) == 2)
