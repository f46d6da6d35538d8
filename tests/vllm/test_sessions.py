"""Streaming sessions: a request is told more after its answer, whose last token is dropped then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmkv_ray.keys import key_list
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.identity.unnamed_request import UnnamedRequest
from lmkv_ray.vllm.scheduler.requests import Asked, TrackedRequest
from tests.vllm.conftest import engine_on, tokens, wait_for_slots
from tests.vllm.engine import Engine
from tests.vllm.local_shard import LocalShard
from tests.vllm.test_identity import known_identity

pytestmark = pytest.mark.vllm

BLOCK = 32
GROUP = Group(0, block_tokens=BLOCK, blocks=1, hash_tokens=BLOCK)


def session(adapter: bool = False) -> Any:
    """VLLM's request, after its answer's last token has completed a block."""
    request = SimpleNamespace(
        lora_request=SimpleNamespace(lora_int_id=1) if adapter else None,
        block_hashes=[b"first", b"dropped"],
        kept=[b"first", b"dropped"],
    )
    request._block_hasher = lambda session: request.kept[len(session.block_hashes) :]
    return request


def continued(request: Any, *hashes: bytes) -> None:
    """More is said: the block of the dropped token is another one."""
    request.block_hashes[:] = request.kept = [b"first", *hashes]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("hashes", [(), (b"said",), (b"said", b"more")])
def test_a_block_of_a_dropped_token_has_another_key(
    hashes: tuple[bytes, ...], adapter: bool
) -> None:
    request = session(adapter)
    tracked = TrackedRequest(request, known_identity(), [GROUP])
    tracked.adapter = b"adapter" if adapter else b""
    before = key_list(tracked.keys(GROUP))
    asked = tracked.asked = Asked(0, 2 * BLOCK)
    continued(request, *hashes)
    after = key_list(tracked.keys(GROUP))
    assert after[:1] == before[:1]
    assert len(after) == 1 + len(hashes)
    assert not set(before[1:]) & set(after)
    assert tracked.asked is not asked, "it was asked of the block of before"
    new = TrackedRequest(request, known_identity(), [GROUP])
    new.adapter = tracked.adapter
    assert after == key_list(new.keys(GROUP))


def test_hashes_without_a_name_follow_the_request() -> None:
    request = session()
    unnamed = UnnamedRequest(request)
    assert unnamed.hashes() == [b"first", b"dropped"]
    continued(request, b"said")
    assert unnamed.hashes() == [b"first", b"said"]


def say(engine: Engine, prompt: list[int], *, last: bool = False) -> None:
    """One turn of a session."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    said = EngineCoreRequest(
        request_id="session",
        prompt_token_ids=[*prompt],  # which it adds to
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, temperature=0, ignore_eos=True),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        resumable=not last,
    )
    core = engine.core()
    core.add_request(Request.from_engine_core_request(said, core.request_block_hasher))
    llm_engine = engine.llm().llm_engine
    while core.scheduler.get_num_unfinished_requests():
        llm_engine.step()
    engine.drain()


def test_what_a_session_dropped_is_not_found_by_those_who_ask_for_it(float32_model: str) -> None:
    shard = LocalShard(16 << 20)
    prompt = tokens(1, 3 * BLOCK - 1)
    with engine_on(shard, float32_model) as engine:
        wait_for_slots(engine, [prompt])
        say(engine, prompt)
        dropped = engine.core().scheduler.requests["session"].all_token_ids[-1]
        said = tokens(2, 70)
        assert said[0] != dropped
        say(engine, said)
        say(engine, [], last=True)
        engine.wait_saved()
        engine.reset()
        [hit] = engine.generate([prompt + said])
        assert hit.cached == 5 * BLOCK, "what was said is found"
        engine.reset()
        [other] = engine.generate([[*prompt, dropped, *said]])
        assert other.cached == 2 * BLOCK, "its third block has another token"
    shard.close()
