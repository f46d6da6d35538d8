from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.vllm.engine import Engine, EngineProcess, make_model
from tests.vllm.local_shard import LocalShard


@pytest.fixture(scope="session")
def bfloat16_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models"), "bfloat16")


@pytest.fixture(scope="session")
def float32_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models"), "float32")


@pytest.fixture(scope="module")
def reference(bfloat16_model: str) -> Iterator[EngineProcess]:
    """VLLM without any connector."""
    engine = EngineProcess(bfloat16_model)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def shard() -> Iterator[LocalShard]:
    made = LocalShard(64 << 20)
    yield made
    made.close()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it did not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def wait_attached(engine: Engine) -> None:
    wait_for(lambda: engine.connector()._link.attachment is not None)
    wait_for(lambda: len(engine.connector()._link._free) > 0)
