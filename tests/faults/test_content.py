"""What the cache believes, or its memory, is wrong."""

from __future__ import annotations

import pytest

from lmkv_ray.messages import MissReason
from tests.faults.lab import Lab
from tests.faults.recovery import Recovery, fault

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@fault("evicted after the directory was told (stale directory)", "a miss, at once", heals_within=30)
def test_evicted_between_lookup_and_read(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared()
    resume = lab.freeze(*lab.directory())
    lab.fill(0)  # evicts it, and nobody hears of it
    resume()
    assert lab.ask(1, document).hits == 0
    recovery.measure(lab)


@pytest.mark.quick
@fault(
    "directory lies: a peer never had what it is said to hold", "a miss, at once", heals_within=30
)
def test_lying_directory(lab: Lab, recovery: Recovery) -> None:
    lab.shared()
    document = lab.new_document()
    peer = lab.engines[0].call("node_id")
    lab.engines[1].call("lie", peer, document, 8)
    answer = lab.ask(1, document)
    assert answer.hits == 0
    assert answer.reason in (MissReason.FETCH_FAILED, MissReason.NEVER_STORED)
    recovery.measure(lab)


@fault("bytes of a fetched chunk changed in the peer's memory", "it is not used", heals_within=30)
def test_bytes_changed_in_the_arena(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared()
    assert lab.ask(1, document).hits == 8
    lab.engines[1].call("damage", document, 8)
    lab.fill(0)
    assert lab.ask(0, document).hits == 0
    lab.fill(1)  # the damaged copy goes
    recovery.measure(lab)


@pytest.mark.quick
@fault("/dev/shm full on a host", "what is cached is served; nothing is saved", heals_within=30)
def test_shared_memory_full(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared()
    lab.hosts[0].run("head -c 2G /dev/zero > /dev/shm/ballast || true")
    try:
        assert lab.ask(0, document).hits == 8
        for _ in range(4):
            lab.ask(0, lab.new_document(), 64)
    finally:
        lab.hosts[0].run("rm /dev/shm/ballast")
    recovery.measure(lab)
