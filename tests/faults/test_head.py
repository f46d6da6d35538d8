"""Ray's head hangs, or dies and comes back with its state on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.faults.lab import Lab
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
    lab.engines[0].close()
    lab.engines[0] = lab.start_engine(head).wait_made()
    recovery.measure(lab)
    assert lab.ask(1, document).hits == 8
    assert lab.actor_pid(lab.hosts[1], "ShardActor") == shard, "the shard did not outlive the head"
