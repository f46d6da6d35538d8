"""The cache's own processes die, hang or are slow."""

from __future__ import annotations

import pytest

from tests.faults.lab import Lab
from tests.faults.recovery import Recovery, fault

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@pytest.mark.quick
@fault("directory killed", "local hits go on", heals_within=30)
def test_directory_killed(lab: Lab, recovery: Recovery) -> None:
    here, there = lab.shared(), lab.shared()
    host, pid = lab.directory()
    host.kill(pid)
    assert lab.ask(0, here).hits == 8
    lab.ask(1, there)
    recovery.measure(lab)
    assert lab.ask(1, lab.shared()).hits == 8
    assert lab.ask(1, here).hits == 8, "the directory was not rebuilt from the shards"


@fault("directory killed, and again while it is rebuilt", "local hits go on", heals_within=45)
def test_directory_killed_twice(lab: Lab, recovery: Recovery) -> None:
    here = lab.shared()
    host, first = lab.directory()
    host.kill(first)
    lab.eventually(lambda: lab.directory()[1] != first)
    host, second = lab.directory()
    host.kill(second)
    assert lab.ask(0, here).hits == 8
    lab.ask(1, here)
    recovery.measure(lab)


@fault("directory frozen", "local hits go on", heals_within=30)
def test_directory_frozen(lab: Lab, recovery: Recovery) -> None:
    here = lab.shared()
    resume = lab.freeze(*lab.directory())
    assert lab.ask(0, here).hits == 8
    lab.ask(1, here)
    lab.ask(1, lab.new_document())
    resume()
    recovery.measure(lab)


@pytest.mark.quick
@fault("shard killed", "its chunks are kept, and local hits go on", heals_within=30)
def test_shard_killed(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared()
    lab.hosts[0].kill(lab.actor_pid(lab.hosts[0], "ShardActor"))
    assert lab.ask(0, document).hits == 8
    lab.ask(1, document)
    recovery.measure(lab)
    assert lab.ask(0, document).hits == 8, "the new shard did not take the arena over"


@fault("shard frozen", "local hits go on", heals_within=30)
def test_shard_frozen(lab: Lab, recovery: Recovery) -> None:
    here, there = lab.shared(), lab.shared()
    pid = lab.actor_pid(lab.hosts[0], "ShardActor")
    resume = lab.freeze(lab.hosts[0], pid)
    assert lab.ask(0, here).hits == 8
    lab.ask(0, lab.new_document())
    lab.ask(1, there)
    resume()
    recovery.measure(lab)


@fault("shard slow (runs a tenth of the time)", "local hits go on", heals_within=30)
def test_shard_slow(lab: Lab, recovery: Recovery) -> None:
    here, there = lab.shared(), lab.shared(32)
    pid = lab.actor_pid(lab.hosts[0], "ShardActor")
    rhythm = f"while true; do kill -STOP {pid}; sleep 0.18; kill -CONT {pid}; sleep 0.02; done"
    lab.hosts[0].run(f"({rhythm}) > /dev/null 2>&1 & echo $! > /tmp/rhythm")
    try:
        assert lab.ask(0, here).hits == 8
        for _ in range(4):
            lab.ask(1, there, 32)
            lab.ask(0, lab.new_document())
    finally:
        lab.hosts[0].run(f"kill $(cat /tmp/rhythm); kill -CONT {pid}")
    recovery.measure(lab)


@fault("all actors of the cache killed at once", "local hits go on", heals_within=45)
def test_all_actors_killed(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared()
    host, pid = lab.directory()
    host.kill(pid)
    for host in lab.hosts:
        host.kill(lab.actor_pid(host, "ShardActor"))
    assert lab.ask(0, document).hits == 8
    lab.ask(1, document)
    recovery.measure(lab)


@pytest.mark.quick
@fault("peer's shard killed while chunks are read from it", "local hits go on", heals_within=30)
def test_peer_dies_while_it_is_read(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared(64)
    lab.fetch_in_the_middle(document, 64)
    lab.hosts[0].kill(lab.actor_pid(lab.hosts[0], "ShardActor"))
    lab.heal()
    assert lab.ask(0, document, 64).hits == 64
    lab.check(lab.engines[1].result())
    recovery.measure(lab)


@fault("engine killed while it saves", "its grants do not outlive it", heals_within=30)
def test_engine_killed_while_it_saves(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared()
    lab.stop_in(0, "save", lab.new_document(), 64)
    lab.replace_engine(0)
    assert lab.ask(0, document).hits == 8
    recovery.measure(lab)
    lab.eventually(lambda: lab.status().engines == 2)


@fault("engine killed while it loads", "its grants do not outlive it", heals_within=30)
def test_engine_killed_while_it_loads(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared(64)
    lab.stop_in(1, "load", document, 64)
    lab.replace_engine(1)
    assert lab.ask(0, document, 64).hits == 64
    recovery.measure(lab)
    lab.eventually(lambda: lab.status().engines == 2)


@fault("engine killed while another node fetches what it saved", "it gets all", heals_within=30)
def test_engine_killed_while_its_chunks_are_fetched(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared(16)
    lab.fetch_in_the_middle(document, 16)
    lab.hosts[0].kill(lab.engines[0].pid)
    lab.heal()
    assert lab.check(lab.engines[1].result()).hits == 16
    lab.replace_engine(0)
    recovery.measure(lab)
