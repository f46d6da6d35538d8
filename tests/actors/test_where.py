"""Where chunks are, on real actors: engines' devices, nodes' memory, and what becomes of both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmkv_ray.actors.names import directory_name
from lmkv_ray.arena.owners import is_alive
from lmkv_ray.directory import GPU, Location
from lmkv_ray.messages import MissReason, Owner
from tests.actors.conftest import Nodes, directory_pid, eventually
from tests.node.fakes import make_keys

pytestmark = pytest.mark.ray

KEYS = make_keys(30)


def places(nodes: Nodes) -> list[list[Location]]:
    return nodes.cache.where(KEYS)


def become(nodes: Nodes, expected: list[list[Location]], within: float = 10) -> None:
    seen: list[list[list[Location]]] = [[]]

    def come() -> bool:
        seen[0] = places(nodes)
        return seen[0] == expected

    try:
        eventually(come, within)
    except AssertionError:
        assert seen[0] == expected  # with a difference to look at


@pytest.mark.parametrize(
    "nodes", [{}, {"directory_parts": 2}], indirect=True, ids=["whole", "2 parts"]
)
def test_devices_and_memory_of_all_nodes(nodes: Nodes) -> None:
    here, there = nodes.engine(nodes.cache.node_id), nodes.engine(nodes.other)
    here.save(KEYS[:20])
    here.tell(KEYS[:10])
    there.tell(KEYS[5:25])
    memory = Location(nodes.cache.node_id)
    ours = Location(nodes.cache.node_id, GPU, here.engine_id)
    theirs = Location(nodes.other, GPU, there.engine_id)
    expected = [
        [
            *sorted(([ours] if i < 10 else []) + ([theirs] if 5 <= i < 25 else [])),
            *([memory] if i < 20 else []),
        ]
        for i in range(30)
    ]
    become(nodes, expected)
    counts = {n.node_id: [e.device_chunks for e in n.engines] for n in nodes.cache.status().nodes}
    assert counts == {nodes.cache.node_id: [10], nodes.other: [20]}
    assert nodes.cache.status().device_chunks == 30
    assert nodes.cache.status().directory_chunks == 20

    # What only a device holds cannot be fetched, and nobody tries.
    assert here.stage(KEYS[20:25]).reason == MissReason.NEVER_STORED
    assert there.stage(KEYS[:20]).ready == 20

    for part in range(len(nodes.cache.status().directory)):
        os.kill(directory_pid(nodes.namespace, directory_name(part)), signal.SIGKILL)
    copy = Location(nodes.other)
    both = [locations + ([copy] if i < 20 else []) for i, locations in enumerate(expected)]
    become(nodes, [sorted(locations, key=lambda p: (p.tier != GPU, p)) for locations in both], 30)

    nodes.cache.clear()
    become(nodes, [[]] * 30)
    assert nodes.cache.status().device_chunks == 0


def test_a_dead_engine_holds_nothing(nodes: Nodes) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        owner = Owner(pid=process.pid, start=int(stat[19]))
        assert is_alive(owner)
        mortal = nodes.engine(nodes.other, owner)
        mortal.tell(KEYS)
        become(nodes, [[Location(nodes.other, GPU, mortal.engine_id)]] * 30)
        process.kill()
    began = time.monotonic()
    become(nodes, [[]] * 30)
    assert time.monotonic() - began < 5


def test_a_restarted_shard_is_told_again(nodes: Nodes) -> None:
    engine = nodes.engine(nodes.cache.node_id)
    engine.tell(KEYS)
    held = [[Location(nodes.cache.node_id, GPU, engine.engine_id)]] * 30
    become(nodes, held)
    os.kill(nodes.pid(nodes.cache.node_id), signal.SIGKILL)
    eventually(lambda: engine.tell().known is False)
    engine.hello()
    become(nodes, [[]] * 30)
    engine.tell(KEYS)
    become(nodes, held)


def test_the_last_events_of_all_services_are_told(nodes: Nodes) -> None:
    engine = nodes.engine(nodes.cache.node_id)
    engine.save(KEYS[:3])
    story = nodes.cache.story()
    assert sorted(service.split()[0] for service in story) == ["directory", "node", "node"]
    [told] = [lines for lines in story.values() if any(engine.engine_id in line for line in lines)]
    assert any(f"s ago exchange {engine.engine_id} 3" in line for line in told)
