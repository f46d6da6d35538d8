"""What the connector says is in the engine's log."""

from __future__ import annotations

import subprocess
import sys

SAY = """
import logging, sys
from lmkv_ray.vllm.engine import log
for name in {arranged}:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{{name}}: %(message)s"))
    logging.getLogger(name).addHandler(handler)
logging.getLogger("vllm").setLevel(logging.INFO)
logging.getLogger("vllm").propagate = False
for half in "scheduler", "worker":
    log.show()
logging.getLogger("lmkv_ray.vllm.link.shard_link").info("attached")
logging.getLogger("lmkv_ray.vllm.link.shard_link").debug("not this")
"""


def said(*arranged: str) -> str:
    """What a process prints in which these loggers had handlers before."""
    # A process of its own: pytest gives handlers to all loggers.
    say = [sys.executable, "-c", SAY.format(arranged=arranged)]
    return subprocess.run(say, capture_output=True, text=True, check=True, timeout=60).stdout


def test_it_is_said_once_and_as_vllm_says_things() -> None:
    assert said("vllm") == "vllm: attached\n"


def test_handlers_of_others_are_left_as_they_are() -> None:
    assert said("vllm", "lmkv_ray") == "lmkv_ray: attached\n"
    assert said("vllm", "") == ": attached\n"
