"""Ray's head hangs, dies and comes back, or is lost for good; the engines stay the same ones."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.faults.lab import CHUNK_BYTES, Lab
from tests.faults.recovery import Recovery, fault
from tests.hosts import ray_cluster, why_not

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(600)]

ROCKSDB = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/var/lib/ray-gcs"}


FROZEN_SECONDS = 5.0


@fault("Ray's GCS frozen for 5 s", "local hits go on, and fetches", heals_within=60)
def test_gcs_frozen(lab: Lab, recovery: Recovery) -> None:
    here, there = lab.shared(by=1), lab.shared(by=0)
    (gcs,) = lab.hosts[0].pids("gcs_server ")
    began = time.monotonic()
    resume = lab.freeze(lab.hosts[0], gcs)
    assert lab.ask(1, here).hits == 8
    assert lab.ask(1, there).hits == 8
    while time.monotonic() < began + FROZEN_SECONDS:
        lab.ask(0, lab.new_document())
    resume()
    recovery.measure(lab)


@pytest.fixture
def lasting_lab() -> Iterator[Lab]:
    """A cluster whose head keeps its state in RocksDB."""
    if reason := why_not():
        pytest.skip(reason)
    made = Lab(2, env=ROCKSDB)
    yield made
    made.close()


@fault("Ray's head restarted (state in RocksDB)", "local hits elsewhere go on", heals_within=120)
def test_head_restarted(lasting_lab: Lab, recovery: Recovery) -> None:
    lab = lasting_lab
    head = lab.hosts[0]
    document = lab.shared(by=1)
    shard = lab.actor_pid(lab.hosts[1], "ShardActor")
    ray_cluster.stop(head)
    assert lab.ask(1, document).hits == 8
    lab.ask(1, lab.new_document())
    ray_cluster.start_head(head, **lab.env)
    recovery.measure(lab)
    assert lab.ask(1, document).hits == 8
    assert lab.actor_pid(lab.hosts[1], "ShardActor") == shard, "the shard did not outlive the head"


LOST = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""Ray's processes wait a minute for their head, unless they are told otherwise."""


@pytest.fixture
def short_lab() -> Iterator[Lab]:
    """A cluster whose processes do not wait long for their head, and forget all when it dies."""
    if reason := why_not():
        pytest.skip(reason)
    made = Lab(2, env=LOST)
    yield made
    made.close()


@fault(
    "Ray's GCS gone for good, then a new cluster",
    "engines live, local hits go on",
    heals_within=120,
)
def test_head_lost_for_good(short_lab: Lab, recovery: Recovery) -> None:
    lab = short_lab
    here = lab.shared(by=1)
    pids = [engine.pid for engine in lab.engines]
    (gcs,) = lab.hosts[0].pids("gcs_server ")
    lab.hosts[0].kill(gcs, signal.SIGKILL)
    # Whatever was joined to the cluster ends: the raylets, the shards, the couriers.
    lab.eventually(lambda: not any(host.pids("raylet/raylet ") for host in lab.hosts), 120)
    lab.eventually(lambda: not lab.actor_pid(lab.hosts[1], "ShardActor"))
    for _ in range(3):
        assert lab.ask(1, here).hits == 8
        lab.ask(0, lab.new_document())
    for host in lab.hosts:
        ray_cluster.stop(host)
    ray_cluster.start_head(lab.hosts[0], **lab.env)
    ray_cluster.join(lab.hosts[1], lab.hosts[0], **lab.env)
    recovery.measure(lab)
    assert [engine.pid for engine in lab.engines] == pids


@fault(
    "Ray's raylet killed under an engine", "the engine lives, local hits go on", heals_within=120
)
def test_raylet_killed(short_lab: Lab, recovery: Recovery) -> None:
    lab = short_lab
    here, host = lab.shared(by=1), lab.hosts[1]
    for raylet in host.pids("raylet/raylet "):
        host.kill(raylet, signal.SIGKILL)
    lab.eventually(lambda: not lab.actor_pid(host, "ShardActor"))
    assert lab.ask(1, here).hits == 8
    lab.ask(1, lab.new_document())
    ray_cluster.stop(host)
    ray_cluster.join(host, lab.hosts[0], **lab.env)
    recovery.measure(lab)


@fault(
    "a note of a dead cluster on a node",
    "the engine says so, and joins once it is right",
    heals_within=60,
)
def test_stale_note(lab: Lab, recovery: Recovery) -> None:
    host, note = lab.hosts[1], "/tmp/ray/ray_current_cluster"
    right = host.run(f"cat {note}").strip()
    host.run(f"echo 127.0.0.1:1 > {note}")
    settings = {name: value for name, value in lab.settings.items() if name != "ray_address"}
    engine = host.remote("tests.faults.standin:StandIn", settings, CHUNK_BYTES).wait_made()
    assert not engine.call("attached")
    assert engine.call("request", lab.new_document(), 8).hits == 0
    host.run(f"echo {right} > {note}")
    lab.eventually(lambda: engine.call("attached"))
    engine.close()
    recovery.measure(lab)
