"""What each room of the connector imports, seen in a fresh interpreter: a list for each.

What does not stand on a list costs nothing where that room runs, and cannot break there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest

PROGRAM = """
import importlib, json, os, sys
import vllm.distributed.kv_transfer.kv_connector.v1.metrics  # what a room needs of vLLM is there

for name, modules in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    if not os.fork():  # a process that has imported no other room
        for module in modules:
            importlib.import_module(module)
        print(json.dumps([name, list(sys.modules)]), flush=True)
        os._exit(0)
    os.wait()
"""

ROOMS = {
    "door": ["lmkv_ray.vllm.connector"],
    "worker": ["lmkv_ray.vllm.worker.half"],
    "scheduler": ["lmkv_ray.vllm.scheduler.half", "lmkv_ray.vllm.scheduler.startup"],
    "link": ["lmkv_ray.vllm.link.shard_link", "lmkv_ray.courier"],
}

COMMON = {
    "metrics",
    "arena",
    "clock",
    "complaints",
    "config",
    "errors",
    "hints",
    "host",
    "index",
    "keys",
}
COMMON |= {"layout", "masking", "messages", "vllm.engine"}
COMMON |= {"anywhere"}  # plans travel in the steps' metadata
COMMON |= {"policies"}  # the settings know their names
COMMON |= {"kernels"}  # transformers imports what has this name, if the repository is on the path

LISTS = {
    "door": COMMON | {"vllm.connector"},
    "worker": COMMON | {"transfer", "vllm.worker"},
    "scheduler": COMMON
    | {"cost", "identity", "ownership", "tenants"}
    | {"vllm.identity", "vllm.link", "vllm.scheduler"},
    "link": COMMON | {"child", "courier", "framing", "vllm.link"},
}
"""Packages and modules of ``lmkv_ray``; of ``lmkv_ray.vllm`` the rooms."""


@cache
def imported() -> dict[str, set[str]]:
    """The modules that each room has imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(ROOMS)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {room: set(modules) for room, modules in lines}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_stands_on_its_list_and_never_ray(room: str) -> None:
    modules = imported()[room]
    assert set(ROOMS[room]) <= modules
    ours = {_part(module) for module in modules if module.startswith("lmkv_ray.")}
    assert ours - {"vllm"} <= LISTS[room], "do without it, or put it on the list"
    assert "ray" not in modules


def _part(module: str) -> str:
    names = module.split(".")[1:]
    return ".".join(names[:2] if names[0] == "vllm" else names[:1])
