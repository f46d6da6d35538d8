"""Real engines, real actors, two raylets: sharing, and death at the worst moment."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray
from ray.cluster_utils import Cluster

from lmkv_ray.actors import Cache, connect
from lmkv_ray.actors.names import DIRECTORY
from lmkv_ray.config import load_settings
from lmkv_ray.directory import GPU, Holding, Location
from tests.faults.recovery import Recovery, fault
from tests.vllm.conftest import tokens, wait_for
from tests.vllm.engine import Answer, EngineProcess

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]

NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100 << 20}
CAPACITY = 32 << 20
STAGE_SECONDS = 4.0


class World:
    """Two nodes, a cache, an engine on each node, and vLLM alone."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        self.model = model
        self.probes = 0
        self.connector: dict[str, Any] = {
            "capacity": CAPACITY,
            "ray_address": cluster.address,
            "ray_namespace": f"lmkv-{uuid.uuid4().hex[:6]}",
            "reconcile_seconds": 0.2,
            "stage_seconds": STAGE_SECONDS,
            "stage_min_tokens": 64,
            "load_when": "always",  # this model computes faster than anything arrives
        }
        self.cache: Cache = connect(settings=load_settings(self.connector))
        wait_for(lambda: len(self.cache.status().nodes) == 2, 60)
        others = {n.node_id for n in self.cache.status().nodes} - {self.cache.node_id}
        self.node_ids = [self.cache.node_id, *others]
        self.alone = EngineProcess(model)
        self.engines = [self.start_engine(node) for node in self.node_ids]
        for engine in self.engines:
            engine.call("wait_attached")

    def start_engine(self, node_id: str) -> EngineProcess:
        return EngineProcess(self.model, connector=self.connector, node_id=node_id)

    def replace_engine(self, node: int) -> None:
        """Kill an engine and start its successor."""
        self.engines[node].process.kill()
        self.engines[node].process.join()
        self.engines[node] = self.start_engine(self.node_ids[node])
        self.engines[node].call("wait_attached")

    def stop_in(self, node: int, copy: str, prompts: list[list[int]], max_tokens: int) -> None:
        """Begin requests whose engine stops in the middle of a "load" or "save"; wait for that."""
        self.engines[node].call("stop_in", copy)
        self.engines[node].start("generate", prompts, max_tokens=max_tokens)
        self.engines[node].wait_stopped()

    def expected(self, prompt: list[int], max_tokens: int = 4) -> tuple[int, ...]:
        [answer] = self.alone.call("generate", [prompt], max_tokens=max_tokens)
        assert isinstance(answer, Answer)
        return answer.tokens

    def saved(
        self, prompt: list[int], engine: EngineProcess | None = None, max_tokens: int = 1
    ) -> list[int]:
        """Let the first node's engine answer a prompt until the directory knows all their chunks.

        More than once if need be: a save is dropped when there is no slot at the moment.

        Returns:
            the prompt and its answer, whose last token is in no chunk: nobody has computed it.
        """
        reader = engine or self.engines[0]
        text: list[int] = []

        def known() -> bool:
            [answer] = reader.call("generate", [prompt], max_tokens=max_tokens)
            text[:] = [*prompt, *answer.tokens]
            reader.call("wait_saved")
            computed = text[:-1]
            keys = b"".join(reader.call("keys", computed))
            asked = self.cache.directory.lookup.remote(keys, "nobody", 0)
            holdings = msgspec.msgpack.decode(ray.get(asked, timeout=10), type=list[Holding])
            return any(holding.run == len(computed) // 32 for holding in holdings)

        wait_for(known)
        return text

    def shard_pid(self, node: int = 0) -> int:
        """0 while it does not answer."""
        node_id = self.node_ids[node]
        return next((n.pid for n in self.cache.status().nodes if n.node_id == node_id), 0)

    def chunks(self, node: int = 0) -> int:
        """Chunks in a node's arena; 0 while its shard does not answer."""
        node_id = self.node_ids[node]
        return next((n.chunks for n in self.cache.status().nodes if n.node_id == node_id), 0)

    def wait_healthy(self, within: float) -> float:
        """Until a new prompt of the one node is a hit on both; returns seconds."""
        began = time.monotonic()
        wait_for(self._is_healthy, within)
        return time.monotonic() - began

    def left_behind(self) -> list[str]:
        """Nothing that could be seen here; the leak check looks when the module is over."""
        return []

    def _is_healthy(self) -> bool:
        self.probes += 1
        prompt = tokens(10_000 + self.probes, 300)
        try:
            self.saved(prompt)
        except Exception:
            return False
        [other] = self.engines[1].call("generate", [prompt])
        self.engines[0].call("reset")
        [same] = self.engines[0].call("generate", [prompt])
        assert other.tokens == same.tokens == self.expected(prompt)
        return bool(other.cached == same.cached == 288)

    def close(self) -> None:
        for engine in (*self.engines, self.alone):
            engine.close()
        self.cache.stop()


@pytest.fixture(scope="module")
def world(float32_model: str) -> Iterator[World]:
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        cluster.add_node(**NODE)
        ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
        made = World(cluster, float32_model)
        try:
            yield made
        finally:
            made.close()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert not list(Path("/dev/shm").glob("lmkv*"))


def kill_while_running(world: World, pid: int, seed: int) -> None:
    """Kill a process in the middle of many requests, known and new, and of a copy into the arena;
    all tokens must be right.
    """
    known = tokens(seed, 400)
    world.saved(known)
    world.engines[0].call("reset")
    prompts = [known, *(tokens(seed + i, 500) for i in range(1, 6)), known[:200] + tokens(seed, 99)]
    world.stop_in(0, "save", prompts, max_tokens=24)
    os.kill(pid, signal.SIGKILL)
    world.engines[0].resume()
    answers = world.engines[0].result()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == world.expected(prompt, max_tokens=24)


def test_another_node_is_served_what_this_one_read(world: World) -> None:
    prompt = tokens(1, 700)
    world.saved(prompt)
    world.engines[1].call("wait_peers")
    [answer] = world.engines[1].call("generate", [prompt])
    assert answer.cached == 672
    assert answer.tokens == world.expected(prompt)


def test_what_another_engine_generated_is_a_hit_too(world: World) -> None:
    turn = world.saved(tokens(2, 100), max_tokens=100) + tokens(3, 10)
    world.engines[1].call("wait_peers")
    [next_turn] = world.engines[1].call("generate", [turn])
    assert next_turn.cached == 192
    assert next_turn.tokens == world.expected(turn)


def test_where_names_the_tiers_of_each_chunk(world: World) -> None:
    prompt = tokens(20, 300)
    world.saved(prompt)
    keys = world.engines[0].call("keys", prompt)
    memory = Location(world.node_ids[0])

    def tiers() -> list[set[str]]:
        places = world.cache.where(keys)
        assert all({p.node_id for p in locations} <= {memory.node_id} for locations in places)
        assert all(bool(p.engine_id) == (p.tier == GPU) for locations in places for p in locations)
        return [{p.tier for p in locations} for locations in places]

    wait_for(lambda: tiers() == [{GPU, "memory"}] * 9)
    assert world.engines[0].call("reset")
    wait_for(lambda: tiers() == [{"memory"}] * 9, 5)
    [answer] = world.engines[0].call("generate", [prompt])  # a hit brings it back
    assert answer.cached == 288
    wait_for(lambda: tiers() == [{GPU, "memory"}] * 9)
    world.engines[0].process.kill()
    wait_for(lambda: tiers() == [{"memory"}] * 9, 5)
    world.replace_engine(0)


@fault("vLLM: shard killed while requests run", "its chunks are kept", heals_within=60)
def test_shard_killed_while_requests_run(world: World, recovery: Recovery) -> None:
    pid = world.shard_pid()
    before = world.chunks()
    kill_while_running(world, pid, 100)
    wait_for(lambda: world.shard_pid() not in (pid, 0), 60)
    wait_for(lambda: world.chunks() >= before)  # it kept its predecessor's arena
    recovery.measure(world)


@fault("vLLM: directory killed while requests run", "requests go on", heals_within=60)
def test_directory_killed_while_requests_run(world: World, recovery: Recovery) -> None:
    directory: Any = ray.get_actor(DIRECTORY, namespace=world.connector["ray_namespace"])
    pid = ray.get(directory.__ray_call__.remote(lambda _: os.getpid()))
    kill_while_running(world, pid, 200)
    recovery.measure(world)


@fault("vLLM: replica killed while it saves", "its successor hits what was saved", heals_within=60)
def test_engine_killed_while_it_saves(world: World, recovery: Recovery) -> None:
    prompt = tokens(300, 600)
    world.saved(prompt)
    world.stop_in(0, "save", [tokens(301 + i, 900) for i in range(8)], max_tokens=8)
    world.replace_engine(0)
    [answer] = world.engines[0].call("generate", [prompt])
    assert answer.cached == 576
    assert answer.tokens == world.expected(prompt)
    wait_for(lambda: world.cache.status().engines == 2)
    recovery.measure(world)


@fault("vLLM: replica killed while it loads", "its successor hits the same", heals_within=60)
def test_engine_killed_while_it_loads(world: World, recovery: Recovery) -> None:
    prompts = [tokens(350 + i, 900) for i in range(4)]
    for prompt in prompts:
        world.saved(prompt)
    world.engines[1].call("wait_peers")
    world.stop_in(1, "load", prompts, max_tokens=1)
    world.replace_engine(1)
    for prompt in prompts:
        [answer] = world.engines[1].call("generate", [prompt])
        assert answer.cached == 896
        assert answer.tokens == world.expected(prompt)
    wait_for(lambda: world.cache.status().engines == 2)
    recovery.measure(world)


@fault("vLLM: both shards frozen", "local hits go on", heals_within=60)
def test_frozen_shard_costs_at_most_the_deadline(world: World, recovery: Recovery) -> None:
    remote = tokens(400, 300)
    world.saved(remote)
    pids = [world.shard_pid(0), world.shard_pid(1)]
    local = tokens(401, 300)
    world.saved(local, world.engines[1])
    world.engines[1].call("reset")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        [hit] = world.engines[1].call("generate", [local])
        assert time.monotonic() - began < 2
        assert hit.cached == 288, "hits in the local arena go on"
        began = time.monotonic()
        [miss] = world.engines[1].call("generate", [remote])
        assert time.monotonic() - began < STAGE_SECONDS + 3
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert miss.cached == 0
    assert miss.tokens == world.expected(remote)
    recovery.measure(world)


def test_two_caches_do_not_see_each_other(world: World) -> None:
    prompt = tokens(500, 300)
    world.saved(prompt)
    other = world.connector | {"ray_namespace": "lmkv-other"}
    engine = EngineProcess(world.model, connector=other)
    try:
        engine.call("wait_attached")
        [answer] = engine.call("generate", [prompt])
        assert answer.cached == 0
    finally:
        engine.close()
        connect(settings=load_settings(other)).stop()
