"""A real engine outlives its Ray cluster, and saves into the next one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.vllm.conftest import tokens, wait_for
from tests.vllm.engine import Engine, EngineProcess

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]

LENGTH, CACHED = 300, 288
LOST = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Seconds for which Ray's processes wait for their head; a minute by default."""


class Observed(Engine):
    """An engine whose line to its shard can be looked at."""

    def line(self) -> tuple[int | None, int, int]:
        """The courier's process, the arena, and how many slots can be filled."""
        connector = self.connector()
        arena = connector._link.attachment.arena_id
        return connector._courier.pid, arena, len(connector._link.slots)

    def driver(self) -> bool:
        """Whether this process itself is in a Ray cluster."""
        import ray

        return ray.is_initialized()


def start_head(port: int) -> Any:
    """Ray's own handle of a head, which is a cluster."""
    options = {"gcs_server_port": port, "include_dashboard": False, "num_cpus": 1}
    return Cluster(initialize_head=True, head_node_args=options).head_node


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv(LOST, "5")
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    return number


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists()


def test_an_engine_outlives_its_cluster_and_saves_into_the_next(
    port: int, float32_model: str
) -> None:
    head = start_head(port)
    settings = {"ray_address": head.gcs_address, "capacity": "8MiB"}
    engine = EngineProcess(float32_model, kind=Observed, connector=settings)
    try:
        engine.call("wait_attached")
        known, new, later = (tokens(seed, LENGTH) for seed in (1, 2, 3))
        [cold] = engine.call("generate", [known])
        engine.call("wait_saved")
        [own] = engine.call("generate", [known])
        assert own.cached == CACHED, "vLLM's own hit"
        courier, arena, _ = engine.call("line")
        raylet = head.all_processes["raylet"][0].process

        head.kill_gcs_server()
        wait_for(lambda: raylet.poll() is not None, 120)
        wait_for(lambda: not runs(courier), 120)
        for prompt, cached in ((known, CACHED), (new, 0)):
            assert engine.call("reset")
            [answer] = engine.call("generate", [prompt])
            assert answer.cached == cached
        [hit] = engine.call("generate", [known])
        assert hit == own, "a hit without a cluster is vLLM's own, to the bit"
        assert hit.tokens == cold.tokens
        assert engine.call("line")[1] == arena

        head.kill_all_processes(check_alive=False, allow_graceful=False)
        head = start_head(port)
        wait_for(lambda: engine.call("line")[1] != arena and engine.call("line")[2] > 0, 120)
        [own] = engine.call("generate", [later])
        engine.call("wait_saved")
        [own] = engine.call("generate", [later])
        assert engine.call("reset")
        [hit] = engine.call("generate", [later])
        assert hit.cached == CACHED, "nothing was saved into the new cluster's arena"
        assert hit == own
        assert not engine.call("driver")
    finally:
        engine.close()
        head.kill_all_processes(check_alive=False, allow_graceful=True)
