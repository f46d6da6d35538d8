from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

from lmkv_ray.config import Settings
from tests.vllm.engine import Answer, Engine, EngineProcess
from tests.vllm.local_shard import LocalShard
from tests.vllm.models import SLIDING, VOCABULARY, make_model


@pytest.fixture(scope="session")
def bfloat16_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models"), "bfloat16")


@pytest.fixture(scope="session")
def float32_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models"), "float32")


@pytest.fixture(scope="session")
def sliding_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("sliding"), "float32", **SLIDING)


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


class Connects(Protocol):
    """One shard, or those of several nodes."""

    def connect(self, settings: Settings, *, start: bool, host: str | None = None) -> LocalShard:
        """The shard of this node, or of another host."""


class LocalCourier:
    """In place of ``Courier``: shards of this process."""

    def __init__(self, shards: Connects, settings: Settings) -> None:
        self._shards = shards
        self._settings = settings

    def shard(self, *, start: bool, host: str | None = None) -> LocalShard:
        return self._shards.connect(self._settings, start=start, host=host)

    def close(self) -> None:
        pass


@contextmanager
def engine_on(shard: Connects, model: str, **options: Any) -> Iterator[Engine]:
    """An engine in this process, attached to one or more shards in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmkv_ray.courier.Courier", lambda made: LocalCourier(shard, made))
        engine = Engine(model, **({"connector": {}} | options))
        try:
            engine.wait_attached()
            yield engine
        finally:
            engine.close()


EXPENSIVE = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # an example takes a second: do not shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def tokens(seed: int, n: int) -> list[int]:
    made: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, n).tolist()
    return made


def wait_for_slots(engine: Engine, prompts: list[list[int]]) -> None:
    """Until each link of each place has slots for all chunks that are kept through it."""
    for place in engine.connector()._scheduler._places:
        wanted = {
            link: {
                (group.number, *prompt[:end])
                for group in engine.connector()._groups
                if place.links.get(group.number) is link
                for prompt in prompts
                for end in range(group.tokens, len(prompt) + 1, group.tokens)
            }
            for link in place.links.values()
        }
        wait_for(lambda wanted=wanted: all(len(link.slots) >= len(wanted[link]) for link in wanted))  # type: ignore[misc]


def save_prompt(engine: Engine, prompt: list[int]) -> None:
    """Let the engine read a prompt, wait until it is saved, and empty the device's cache."""
    save_prompts(engine, [prompt])


def save_prompts(engine: Engine, prompts: list[list[int]]) -> None:
    """The same with several at once."""
    wait_for_slots(engine, prompts)
    engine.generate(prompts, max_tokens=1)
    engine.wait_saved()
    assert engine.reset(), "blocks are still held"


class Evictable(Protocol):
    def evict_all(self) -> None: ...


def forget(engine: Engine, shard: Evictable) -> None:
    """Empty vLLM's own cache and the shard, once nothing is on its way there any more."""
    engine.wait_saved()
    assert engine.reset(), "blocks are still held"
    shard.evict_all()


def own_hit_and_ours(
    engine: Engine, shard: Evictable, first: list[int], second: list[int]
) -> tuple[Answer, Answer]:
    """Answers to ``second`` after ``first`` was read: from vLLM's own cache, and from ours."""
    forget(engine, shard)
    save_prompt(engine, first)
    shard.evict_all()
    engine.generate([first], max_tokens=1)
    [own] = engine.generate([second])
    forget(engine, shard)
    save_prompt(engine, first)
    [ours] = engine.generate([second])
    return own, ours
