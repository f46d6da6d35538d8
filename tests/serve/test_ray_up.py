"""`ray up` with cluster_configs/on_premises.yaml, from a laptop onto two machines that share."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from serve_apps.model import CHECKOUT
from tests.hosts import Host, Hosts, Remote, why_not

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.faults,  # takes minutes: not in make test
    pytest.mark.timeout(1200),
]

CONFIG = CHECKOUT / "cluster_configs" / "on_premises.yaml"
APP = CHECKOUT / "serve_apps" / "llm.yaml"
HOME = "/root/lmkv_ray"
TOKENS, CACHED = 536, 512
WORKERS_END_SECONDS = 150
"""Nobody stops the workers: they end a minute after the head."""
NAMES = re.compile(r"ray::|raylet|gcs_server|VLLM::")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """The head, a worker, and the laptop that starts them; the checkout is in ~/lmkv_ray."""
    if reason := why_not(ssh=True):
        pytest.skip(reason)
    with Hosts(3, ssh=True, shm="2g") as made:
        for host in made:
            host.run(f"ln -s {CHECKOUT} {HOME}")
            host.run(f"test -e {HOME}/.venv || ln -s {sys.prefix} {HOME}/.venv")
        yield made


def config(hosts: Hosts) -> str:
    """The file, with what a user replaces in it, and sizes for a small machine."""
    text = CONFIG.read_text()
    for old, new in {
        "192.0.2.10": hosts[0].ip,
        "192.0.2.11, 192.0.2.12": hosts[1].ip,
        "ubuntu": "root",
        "min_workers: 2\nmax_workers: 2": "min_workers: 1\nmax_workers: 1",
        "LMKV_CAPACITY=64GiB": "LMKV_CAPACITY=1GiB",
        # One CPU each, so that Serve needs both machines for two replicas.
        "--object-store-memory=4294967296": "--object-store-memory=200000000 --num-cpus=1",
    }.items():
        assert old in text
        text = text.replace(old, new)
    return text


def app(model: Path) -> str:
    """The app's file, with the model of the tests and a router that obeys."""
    content = yaml.safe_load(APP.read_text())
    router = {"request_router_class": "serve_apps.pinned_router:PinnedRouter"}
    content["applications"][0]["args"] |= {
        "model": str(model),
        "max_model_len": 2048,
        "cpu_threads": 1,
        "engine_kwargs": {"enable_prompt_tokens_details": True},
        "deployment": {"request_router_config": router},
        "cache": {"stage_min_tokens": 64, "stage_seconds": 30, "load_when": "always"},
    }
    return yaml.safe_dump(content)


def test_a_cluster_from_nothing_to_nothing(hosts: Hosts, smollm2: Path) -> None:
    head, worker, laptop = hosts
    laptop.write("/root/.ssh/id_ed25519", hosts.key_file.read_text(), mode=0o600)
    laptop.write("/root/on_premises.yaml", config(hosts))
    laptop.run("ray get-auth-token --generate")
    laptop.run("ray up --yes --no-config-cache on_premises.yaml", timeout=200)

    visitor: Remote = head.remote(
        "tests.serve.visitor:Visitor", str(smollm2), smollm2.name, env={"RAY_AUTH_MODE": "token"}
    )
    assert visitor.call("wait_nodes", 2) == [head.ip, worker.ip]
    with pytest.raises(AssertionError, match="InvalidAuthToken"):
        laptop.run(f"ray status --address={head.ip}:6379", env={"RAY_AUTH_MODE": "disabled"})

    head.write("/root/llm.yaml", app(smollm2))
    head.run("serve deploy llm.yaml", env={"RAY_AUTH_MODE": "token"})
    visitor.start("replicas", 2)
    a, b = visitor.result(timeout=500)
    visitor.call("new_document", TOKENS)
    cold, floor = visitor.call("ask", a), visitor.call("ask", a)
    assert (cold.prompt_tokens, cold.cached_tokens, floor.cached_tokens) == (TOKENS, 0, CACHED)
    visitor.call("wait_saved", CACHED // 32)
    other = visitor.call("ask", b)
    assert (other.cached_tokens, other.text) == (CACHED, floor.text)
    assert visitor.call("staged") == CACHED // 32, "both replicas run on one host"

    visitor.close()
    laptop.run("ray down --yes on_premises.yaml", timeout=120)
    deadline = time.monotonic() + WORKERS_END_SECONDS
    while left := [line for host in (head, worker) for line in running(host)]:
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(1)
    for host in (head, worker):
        assert "lmkv" not in host.run("ls /dev/shm")


def running(host: Host) -> list[str]:
    """Processes of Ray and vLLM."""
    lines = host.run("ps -eo args").splitlines()
    return [f"{host.name}: {line[:80]}" for line in lines if NAMES.search(line)]
