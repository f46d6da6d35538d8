"""The comparison of caches: each gets its rows or its reason, and wrong answers are seen."""

from typing import Any

import pytest

from benchmarks.gpu.copies import Floors
from benchmarks.gpu.engines import LLAMA_8B, SMALL, Contender, Size, contenders, missing
from benchmarks.gpu.ttft import REPEATS, compare
from benchmarks.table import Row
from tests.vllm.engine import Answer

FLOORS = Floors(to_device=1e9, from_device=1e9, within=2e9)


class FakeEngine:
    """Takes a second for what it has not read, and ``hit`` seconds for the rest."""

    def __init__(self, hit: float, *, wrong: bool = False, stuck: bool = False) -> None:
        self.hit, self.wrong, self.stuck = hit, wrong, stuck
        self.read: set[tuple[int, ...]] = set()
        self.asked: list[str] = []
        self.closed = False

    def start(self, method: str, *args: Any) -> None:
        self.asked.append(method)
        self.answer = getattr(self, method)(*args)

    def result(self, timeout: float) -> Any:
        return self.answer

    def close(self) -> None:
        self.closed = True

    def settle(self) -> None:
        pass

    def reset(self) -> bool:
        return not self.stuck

    def first_token(self, prompt: list[int]) -> float:
        seen = tuple(prompt) in self.read
        self.read.add(tuple(prompt))
        return self.hit if seen else 1.0

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
        return [Answer((sum(p) + self.wrong,), (0.0,), len(p)) for p in prompts]

    def steps_beside(self, *args: object) -> tuple[list[float], list[float]]:
        return [0.01] * 3, [0.02] * 3


def measure(**engines: FakeEngine) -> tuple[dict[str, Row], list[str]]:
    them = [Contender(name, {} if number else None, {}) for number, name in enumerate(engines)]
    rows, absent, failed = compare(
        them,
        SMALL,
        FLOORS,
        lambda each: engines[each.name],  # type: ignore[arg-type, return-value]
        gpu=False,
    )
    assert all(engine.closed for engine in engines.values() if engine.asked)
    assert not absent
    return {row.name: row for row in rows}, failed


def test_a_hit_is_compared_with_the_own_prefix_cache_and_the_link() -> None:
    cache = FakeEngine(0.5)
    rows, failed = measure(alone=FakeEngine(0.25), cache=cache)
    assert not failed
    assert rows["TTFT, 512 tokens, alone, hit"].value == 250
    hit = rows["TTFT, 512 tokens, cache, hit"]
    kv_bytes = 512 * 2 * 4 * 2 * 32 * 4  # K and V, layers, heads, values, float32
    assert hit.value == 500
    assert hit.floor == pytest.approx(250 + kv_bytes / 1e9 * 1e3)
    assert hit.ratio == pytest.approx(500 / hit.floor)
    assert rows["TTFT, 512 tokens, cache, hits that answer as vLLM alone"].ratio == 1
    assert rows["answers that differ when only the first 16 tokens do"].ratio == 1
    assert rows["decode step while 1,024 tokens are loaded, cache"].ratio == 2
    assert cache.asked.count("reset") == len(SMALL.lengths) * 2 * (REPEATS + 1) + 1


def test_wrong_answers_are_seen() -> None:
    rows, _ = measure(alone=FakeEngine(0.1), cache=FakeEngine(0.1, wrong=True))
    assert rows["TTFT, 512 tokens, cache, hits that answer as vLLM alone"].ratio == 0


def test_one_cache_that_fails_does_not_cost_the_others() -> None:
    rows, failed = measure(
        alone=FakeEngine(0.1), broken=FakeEngine(0.1, stuck=True), good=FakeEngine(0.1)
    )
    assert failed == ["broken: vLLM's prefix cache could not be emptied: blocks are still in use"]
    assert any("good" in name for name in rows)


def test_without_vllm_alone_there_is_nothing_to_compare_with() -> None:
    class Dead(FakeEngine):
        def first_token(self, prompt: list[int]) -> float:
            raise RuntimeError("dead\nwith a long story")

    assert measure(alone=Dead(0.1), cache=FakeEngine(0.1)) == ({}, ["alone: dead"])


def test_what_cannot_be_had_here_is_named_and_no_failure() -> None:
    them = [
        Contender("LMCache", {}, {}, needs="no_such_module"),
        Contender("OffloadingConnector", {}, {}, gpu_only=True),
    ]
    found = compare(them, SMALL, FLOORS, lambda each: pytest.fail("started"), gpu=False)
    reasons = [
        "LMCache: no_such_module is not installed",
        "OffloadingConnector: it runs on GPUs only",
    ]
    assert found == ([], reasons, [])
    assert not missing(them[1], gpu=True)


@pytest.mark.parametrize("size", [LLAMA_8B, SMALL])
def test_vllm_knows_every_name(size: Size) -> None:
    from vllm import EngineArgs
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert set(size.options) <= set(EngineArgs.__dataclass_fields__)
    for contender in contenders(size, "address")[1:]:
        assert contender.transfer is not None
        config = KVTransferConfig(**contender.transfer)
        known = config.kv_connector in KVConnectorFactory._registry
        assert known or config.kv_connector_module_path == "lmkv_ray.vllm"
