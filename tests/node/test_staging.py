"""Staging between shards of one process: who is asked, how often, and what is said about it."""

import asyncio
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.config import load_settings
from lmkv_ray.directory import Holding
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import MissReason, Stage, StageReply, decode
from lmkv_ray.node.peers import Peers
from lmkv_ray.node.sources import GivenFinder, PeerFinder
from lmkv_ray.node.staging import Staging
from lmkv_ray.tenants import space_of, tenant_of
from lmkv_ray.transports import (
    Answer,
    ObjectStoreServer,
    ObjectStoreTransport,
    PeerInfo,
    Transports,
)
from tests.node.fakes import FakeEngine, LocalShard, make_keys, new_arena

SETTINGS = load_settings({"capacity": 8 << 20})


class Node:
    def __init__(self, name: str) -> None:
        self.name = name
        self.shard = LocalShard(new_arena(SETTINGS, name), SETTINGS, name)
        self.engine = FakeEngine(self.shard.call)
        self.server = ObjectStoreServer(self.shard.reader)
        self.claims: list[bytes] = []
        """What the directory wrongly believes it holds."""
        self.reads = 0
        self.asked = asyncio.Event()
        self.delay = 0.0
        self.dead = False

    async def serve(self, transport: str, keys: bytes) -> Answer:
        self.reads += 1
        self.asked.set()
        await asyncio.sleep(self.delay)
        if self.dead:
            raise ConnectionError("killed")
        return await self.server.answer(keys)

    def close(self) -> None:
        self.engine.close()
        self.shard.close()


class FakePeers(Peers):
    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes
        self.directory_answers = True

    async def lookup(self, keys: bytes, within: float) -> list[Holding] | None:
        if not self.directory_answers:
            return None
        found = []
        for node in self.nodes.values():
            held = [
                i
                for i, key in enumerate(key_list(key_array(keys)))
                if key in node.shard.state.chunks or key in node.claims
            ]
            if held:
                found.append(Holding(node_id=node.name, run=0, positions=held))
        return found

    async def peer(self, node_id: str, within: float) -> PeerInfo | None:
        node = self.nodes[node_id]
        writer = node.shard.writer
        return PeerInfo(
            node_id,
            "elsewhere",
            writer.arena_id,
            {"object_store": node.server.offer("")},
            node.serve,
        )

    def forget(self, node_id: str) -> None:
        pass


@pytest.fixture
def nodes() -> Iterator[dict[str, Node]]:
    nodes = {name: Node(name) for name in ("here", "a", "b")}
    yield nodes
    for node in nodes.values():
        node.close()


@pytest.fixture
def here(nodes: dict[str, Node]) -> Node:
    return nodes.pop("here")


@pytest.fixture
def peers(nodes: dict[str, Node]) -> FakePeers:
    return FakePeers(nodes)


def peer_finder(peers: FakePeers) -> PeerFinder:
    transports = Transports([ObjectStoreTransport(SYSTEM_CLOCK)], "auto", SYSTEM_CLOCK)
    return PeerFinder(peers, transports, SYSTEM_CLOCK)


@pytest.fixture
def staging(here: Node, peers: FakePeers) -> Iterator[Staging]:
    yield Staging(here.shard, [peer_finder(peers)])
    here.close()


def request(here: Node, keys: list[bytes], within: float = 10) -> Stage:
    return decode(here.engine.stage_message(keys, within), Stage)


KEYS = make_keys(20)


async def test_nodes_are_combined(staging: Staging, here: Node, nodes: dict[str, Node]) -> None:
    here.engine.save(KEYS[3:5])
    nodes["a"].engine.save(KEYS[:8])
    nodes["b"].engine.save(KEYS[8:])
    reply = await staging.stage(request(here, KEYS))
    assert reply == StageReply(ready=20, reason=None)
    assert here.engine.intact(KEYS) == 20
    assert staging.counters.staged == 18
    assert here.shard.reader.checksums(here.shard.reader.lookup(key_array(KEYS[:1])).slots)[0] > 0


async def test_a_chunk_is_fetched_once(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    nodes["a"].engine.save(KEYS)
    nodes["a"].delay = 0.05
    stages = [staging.stage(request(here, KEYS[:n])) for n in (10, 20, 20, 5)]
    replies = await asyncio.gather(*stages)
    assert [(r.ready, r.reason) for r in replies] == [(n, None) for n in (10, 20, 20, 5)]
    assert staging.counters.staged == 20
    assert nodes["a"].reads == 2


async def test_another_node_is_asked_when_one_does_not_deliver(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    nodes["a"].claims = KEYS
    nodes["b"].engine.save(KEYS)
    assert await staging.stage(request(here, KEYS)) == StageReply(ready=20, reason=None)
    assert staging.counters.staged == 20


async def test_nodes_that_hold_the_same_share_the_work(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    """Each fetch has one source, so bandwidth grows with the holders of what many ask for."""
    for node in nodes.values():
        node.engine.save(KEYS)
    for key in KEYS:
        assert (await staging.stage(request(here, [key]))).ready == 1
    assert all(node.reads > 0 for node in nodes.values())  # not so by chance in 1 of 500,000
    assert sum(node.reads for node in nodes.values()) == len(KEYS)


async def test_a_peer_that_dies_is_a_failed_fetch(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    nodes["a"].engine.save(KEYS)
    nodes["a"].dead = True
    reply = await staging.stage(request(here, KEYS))
    assert reply == StageReply(ready=0, reason=MissReason.FETCH_FAILED)
    no_slots_leaked = here.shard.state.engines()
    assert no_slots_leaked == {"engine": ("fake", 0, 0)}


async def test_nobody_holds_it(staging: Staging, here: Node) -> None:
    assert await staging.stage(request(here, KEYS)) == StageReply(
        ready=0, reason=MissReason.NEVER_STORED
    )
    here.engine.save(KEYS)
    here.shard.clear(None)
    assert (await staging.stage(request(here, KEYS))).reason == MissReason.CLEARED


async def test_only_the_leading_run_is_fetched(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    nodes["a"].engine.save([*KEYS[:4], *KEYS[5:]])
    reply = await staging.stage(request(here, KEYS))
    assert reply == StageReply(ready=4, reason=MissReason.NEVER_STORED)
    assert staging.counters.staged == 4


async def test_the_deadline_holds_when_a_peer_hangs(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    nodes["a"].engine.save(KEYS)
    nodes["a"].delay = 60
    start = time.monotonic()
    reply = await staging.stage(request(here, KEYS, within=0.2))
    assert reply == StageReply(ready=0, reason=MissReason.STAGE_TIMEOUT)
    assert time.monotonic() - start < 5
    assert here.shard.state._extents.reserved_slots(40960) == 0


@pytest.mark.parametrize(
    ("wrong", "ready"),
    [
        ({"within": math.nan}, 0),
        ({"within": -math.inf}, 0),
        ({"within": math.inf}, 20),
        ({"remaining": [math.nan] * 21}, 20),
        ({"remaining": [0.0]}, 20),
        ({"keys": b"".join(KEYS) + b"odd"}, 20),
    ],
    ids=["nan", "past", "inf", "remaining nan", "remaining short", "keys"],
)
async def test_what_makes_no_sense_in_a_stage_breaks_nothing(
    staging: Staging,
    here: Node,
    nodes: dict[str, Node],
    wrong: dict[str, Any],
    ready: int,
) -> None:
    nodes["a"].engine.save(KEYS)
    asked = staging.stage(structs.replace(request(here, KEYS), **wrong))
    assert (await asyncio.wait_for(asked, 5)).ready == ready


async def test_a_directory_that_is_away_is_a_timeout(
    staging: Staging, here: Node, peers: FakePeers
) -> None:
    peers.directory_answers = False
    reply = await staging.stage(request(here, KEYS))
    assert reply.reason == MissReason.STAGE_TIMEOUT


async def test_an_unknown_engine_is_detached(staging: Staging, here: Node) -> None:
    here.engine.engine_id = "stranger"
    reply = await staging.stage(request(here, KEYS))
    assert reply.reason == MissReason.DETACHED


async def test_what_was_cleared_meanwhile_does_not_arrive(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    nodes["a"].engine.save(KEYS)
    nodes["a"].delay = 0.1
    stage = asyncio.create_task(staging.stage(request(here, KEYS)))
    async with asyncio.timeout(5):
        await nodes["a"].asked.wait()
    here.shard.clear(None)
    assert (await stage).ready == 0
    assert here.engine.intact(KEYS) == 0


async def test_a_prompt_larger_than_a_window(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    keys = make_keys(90, 5)
    for i in range(0, 90, 30):
        nodes["a"].engine.save(keys[i : i + 30])
    assert await staging.stage(request(here, keys)) == StageReply(ready=90, reason=None)
    assert here.engine.intact(keys) == 90


async def test_many_prompts_share_the_slots(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    """What is being staged has a quarter of the arena: 50 slots here."""
    nodes["a"].delay = 0.01
    prompts = [make_keys(40, seed) for seed in (6, 7, 8, 9)]
    for keys in prompts:
        for i in range(0, 40, 20):
            nodes["a"].engine.save(keys[i : i + 20])
    replies = await asyncio.gather(*(staging.stage(request(here, keys)) for keys in prompts))
    assert replies == [StageReply(ready=40, reason=None)] * len(prompts)


async def test_a_short_prompt_does_not_wait_for_all_of_a_long_one(
    staging: Staging, here: Node, nodes: dict[str, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmkv_ray.node.staging.WINDOW", 8)
    here.shard.state.limits = replace(here.shard.state.limits, holder_slots=8)
    nodes["a"].delay = 0.05
    long, short = make_keys(80, 10), make_keys(4, 11)
    for keys in (long[:40], long[40:], short):
        nodes["a"].engine.save(keys)
    first = asyncio.create_task(staging.stage(request(here, long)))
    async with asyncio.timeout(5):
        await nodes["a"].asked.wait()
    assert (await staging.stage(request(here, short))).ready == 4
    assert not first.done()
    assert (await first).ready == 80


async def test_slots_that_engines_keep_are_not_waited_for(
    staging: Staging, here: Node, nodes: dict[str, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes["a"].engine.save(KEYS)
    monkeypatch.setattr(here.shard, "reserve", lambda *args: [])
    async with asyncio.timeout(5):
        reply = await staging.stage(request(here, KEYS, within=60))
    assert reply == StageReply(ready=0, reason=MissReason.FETCH_FAILED)


async def test_a_slot_that_was_committed_is_not_released(
    monkeypatch: pytest.MonkeyPatch, staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    """Another stage may have it by then: what that one writes would be another chunk's bytes."""
    nodes["a"].engine.save(KEYS[:3])
    nodes["a"].claims = KEYS[3:4]
    released: list[int] = []
    release = here.shard.release

    def note(space: int, slot_bytes: int, slots: Iterable[int]) -> None:
        released.extend(given := [*slots])
        release(space, slot_bytes, given)

    monkeypatch.setattr(here.shard, "release", note)
    assert (await staging.stage(request(here, KEYS[:4]))).ready == 3
    ready = {here.shard.state.chunks.slot(key) for key in KEYS[:3]}
    assert released
    assert not ready & {*released}


async def test_what_is_staged_belongs_to_the_tenant_who_asked(
    here: Node, nodes: dict[str, Node], peers: FakePeers
) -> None:
    """And what a node takes from another, to the tenant whose it is there."""
    namespace = space_of(b"n" * 16)
    alice, bob = namespace | tenant_of("alice"), namespace | tenant_of("bob")
    engine = FakeEngine(here.shard.call, "salted", space=namespace)
    staging = Staging(
        here.shard,
        [peer_finder(peers)],
    )
    nodes["a"].engine.save(KEYS)
    stage = structs.replace(decode(engine.stage_message(KEYS[:3]), Stage), space=alice)
    assert (await staging.stage(stage)).ready == 3
    finder = GivenFinder(
        peer_finder(peers),
        "a",
    )
    size = here.shard.writer.geometry.slot_size(engine.nbytes)
    assert await staging.take(bob, size, KEYS[3:5], 10, finder) == KEYS[3:5]
    strange = structs.replace(stage, keys=KEYS[5], space=space_of(b"m" * 16) | 1)
    assert (await staging.stage(strange)).ready == 1
    chunks = here.shard.state.chunks
    assert [chunks.space(key) for key in KEYS[:6]] == [alice] * 3 + [bob] * 2 + [namespace]
    assert len(here.shard.state._leases.holders) <= 3, "tenants do not pile up as holders"
    here.shard.clear(alice)
    assert [key in chunks for key in KEYS[:6]] == [False] * 3 + [True] * 3
    engine.close()
    here.close()


async def test_a_chunk_of_another_size_is_not_taken(
    staging: Staging, here: Node, nodes: dict[str, Node]
) -> None:
    """Behind a short one the slot has bytes of another chunk, which an engine would load."""
    stranger = FakeEngine(nodes["a"].shard.call, "short", nbytes=here.engine.nbytes - 8)
    stranger.save(KEYS[:2])
    nodes["b"].engine.save(KEYS[2:4])
    reply = await staging.stage(request(here, KEYS[:4]))
    assert reply == StageReply(ready=0, reason=MissReason.FETCH_FAILED)
    assert [key in here.shard.state.chunks for key in KEYS[:4]] == [False, False, True, True]
    here.shard.state.validate()
    stranger.close()


def test_where_chunks_are_is_told_of_those_of_the_engines_size_only(here: Node) -> None:
    stranger = FakeEngine(here.shard.call, "short", nbytes=here.engine.nbytes - 8)
    stranger.save(KEYS[:1])
    here.engine.save(KEYS[1:2])
    located = here.shard.located(
        StageReply(ready=2, reason=None), b"".join(KEYS[:2]), here.engine.nbytes
    )
    assert located.slots[0] == -1
    assert located.slots[1] >= 0
    stranger.close()
    here.close()
