"""Blocks that vLLM has cached before their holes are filled: no other request may use them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmkv_ray.anywhere.plan import PlanLimits, plan
from lmkv_ray.vllm.scheduler.composer import Composed, Composer, ready
from tests.anywhere.test_plan import match

BLOCK, TOKENS = 32, 300


class Request:
    """Of vLLM's request, what names need."""

    def __init__(self, request_id: str = "r") -> None:
        self.request_id = request_id
        self.all_token_ids = list(range(TOKENS))
        self.block_hashes: list[bytes] = []
        self.num_preemptions, self.lora_request, self.cache_salt = 0, None, None
        self.num_computed_tokens = 0
        self.status = SimpleNamespace(name="WAITING")
        self.update_block_hashes()

    def update_block_hashes(self) -> None:
        for i in range(len(self.block_hashes), len(self.all_token_ids) // BLOCK):
            before = self.block_hashes[i - 1] if i else b""
            self.block_hashes.append(bytes(hash((before, i)).to_bytes(8, "big", signed=True)))


@pytest.fixture
def composer() -> Composer:
    return Composer(BLOCK, PlanLimits(rows=4, tokens=200))


def compose(composer: Composer, request: Any) -> Composed:
    found = [match(40, 100, 17, 1), match(160, 100, 5, 2)]
    made = plan(0, found, n=TOKENS, chunk_tokens=32)
    assert made is not None
    return composer.compose(request, made)


def loading(composer: Composer, request: Any) -> Composed:
    its = compose(composer, request)
    assert composer.claim(its, 0, 0) is not None
    its.loading = True
    return its


def test_another_request_waits_until_holes_are_scheduled(composer: Composer) -> None:
    first, second, exact = Request("a"), Request("b"), Request("c")
    its = loading(composer, first)
    compose(composer, second)
    assert second.block_hashes == first.block_hashes
    assert composer.unfinished(second, 64)
    assert not composer.unfinished(second, 32), "an exact block"
    assert not composer.unfinished(first, 64), "its own"
    assert not composer.unfinished(exact, 64), "other names"
    composer.begun(its)
    assert not composer.unfinished(second, 64)


def test_a_request_that_ends_before_leaves_no_block_behind(composer: Composer) -> None:
    table = [list(range(10, 20))]
    its = loading(composer, Request())
    assert composer.finished(its, table) == set(range(10, 20))
    assert composer.loading == []
    its = loading(composer, Request())
    composer.begun(its)
    assert composer.finished(its, table) == ()


def test_names_are_restored_with_those_of_generated_tokens(composer: Composer) -> None:
    request = Request()
    exact = list(request.block_hashes)
    its = loading(composer, request)
    assert request.block_hashes[:1] == exact[:1]
    assert not set(request.block_hashes[1:]) & set(exact)
    request.all_token_ids += range(100)
    composer.drop(its, 0)
    assert request.block_hashes[: len(exact)] == exact
    assert len(request.block_hashes) == 400 // BLOCK
    assert its.exact is None
    assert composer.claim(its, 0, 0) is None, "it is not put together again"


def test_what_the_device_has_keeps_its_names(composer: Composer) -> None:
    request = Request()
    its = compose(composer, request)
    named = list(request.block_hashes)
    composer.drop(its, 96)
    assert request.block_hashes[:3] == named[:3]
    assert request.block_hashes[3:] != named[3:], "computed on top of it, and not copied"
    assert its.exact == 32, "nothing behind it is saved"


def test_with_more_on_the_device_less_is_copied(composer: Composer) -> None:
    its = compose(composer, Request())
    plan = composer.claim(its, 192, 192)
    assert plan is not None
    assert (plan.exact, plan.resume, plan.holes) == (192, 260, ())
    assert composer.claim(its, 288, 288) is None


def test_a_request_is_ready_when_vllm_would_begin_it(composer: Composer) -> None:
    request = Request()
    its = loading(composer, request)
    request.status.name = "WAITING_FOR_REMOTE_KVS"
    assert list(ready(composer, set(), set())) == []
    assert list(ready(composer, {"r"}, set())) == [its]
    assert list(ready(composer, {"r"}, {"r"})) == []
    request.status.name = "WAITING"
    assert list(ready(composer, set(), set())) == []
    request.num_computed_tokens = 260
    assert list(ready(composer, set(), set())) == [its]


def test_an_error_leaves_the_names_of_a_request(
    composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> list[bytes]:
        raise ValueError("no names")

    request = Request()
    before = [*request.block_hashes]
    monkeypatch.setattr("lmkv_ray.vllm.scheduler.composer.names", fail)
    with pytest.raises(ValueError, match="no names"):
        compose(composer, request)
    assert request.block_hashes == before
