"""A request's ``cache_salt``, from vLLM's hashes to the shard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lmkv_ray.tenants import tenant_of
from tests.vllm.conftest import wait_for
from tests.vllm.local_shard import LocalShard
from tests.vllm.two_places import SIZE, Engine, prompt

pytestmark = pytest.mark.vllm

TABLE = list(range(1, 9))


@pytest.fixture
def shards() -> Iterator[list[LocalShard]]:
    made = [LocalShard(16 << 20), LocalShard(16 << 20)]
    yield made
    for shard in made:
        shard.close()


def test_a_salt_reaches_the_shard_with_each_chunk(shards: list[LocalShard]) -> None:
    engine = Engine(shards[0], shards[1])
    asked: list[int] = []
    try:
        requests = [prompt("a", 1, 8), prompt("b", 2, 8)]
        requests[0].cache_salt = "alice"
        for request in requests:
            engine.compute(request, TABLE)
        identity: Any = engine.places[0].identity
        for number, shard in enumerate(shards):
            chunks = shard.state.chunks
            namespace = identity.space(number)
            expected = {namespace | tenant_of("alice"), namespace | tenant_of("")}
            assert {chunks.space(key) for key in chunks} == expected
        link = engine.places[1].link
        stage = link.stage

        def watched(*args: Any, **more: Any) -> Any:
            asked.append(more["space"])
            return stage(*args, **more)

        link.stage = watched  # type: ignore[method-assign]
        again = prompt("c", 1, 8)
        again.cache_salt = "alice"
        engine.ask(again)
        wait_for(lambda: bool(asked))
        assert set(asked) == {identity.space(1) | tenant_of("alice")}, "what is staged is hers too"
        assert engine.match(again) == 8 * SIZE
    finally:
        engine.close()


@pytest.mark.parametrize("salt", [5, b"alice", 1.5, ["a"], "\ud800"])
def test_a_salt_of_any_kind_costs_no_engine(shards: list[LocalShard], salt: object) -> None:
    engine = Engine(shards[0], shards[1])
    try:
        request = prompt("a", 1, 8)
        request.cache_salt = salt
        engine.compute(request, TABLE)
        again = prompt("b", 1, 8)
        again.cache_salt = salt
        assert engine.ask(again) == 8 * SIZE
        engine.load(again, 8 * SIZE, TABLE)
    finally:
        engine.close()


class _Unreadable:
    def __str__(self) -> str:
        raise ValueError("nobody has thought of this")


def test_a_request_that_could_not_be_tracked_costs_no_engine(shards: list[LocalShard]) -> None:
    engine = Engine(shards[0], shards[1])
    try:
        request = prompt("a", 1, 8)
        request.cache_salt = _Unreadable()
        engine.half.on_new_request(request)
        assert engine.half.match(request, 0) == (0, False)
        engine.half.admitted(request, [TABLE], 0)
        engine.step()
    finally:
        engine.close()


def test_salts_share_no_block_hash() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(16, sha256)

    def hashes(salt: str | None) -> list[bytes]:
        request = Request(
            request_id="r",
            prompt_token_ids=list(range(100)),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            cache_salt=salt,
            block_hasher=hasher,
        )
        return list(request.block_hashes)

    made = [hashes(salt) for salt in (None, "alice", "bob")]
    assert [len(keys) for keys in made] == [6, 6, 6]
    assert hashes("alice") == made[1]
    assert len({keys for salted in made for keys in salted}) == 18, "not even the first ones"
