"""An fp8 KV cache: its pages are bytes like any other, under another namespace."""

from __future__ import annotations

import pytest

from tests.vllm.conftest import engine_on, own_hit_and_ours, tokens
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm


def test_a_hit_is_vllms_own(bfloat16_model: str, shard: LocalShard) -> None:
    with engine_on(shard, bfloat16_model, kv_cache_dtype="fp8", block_size=64) as engine:
        [nbytes] = engine.connector()._scheduler._shape.nbytes
        assert nbytes == 64 * 4 * 2 * 2 * 32, "one byte for each of 4 layers' 2 heads' K and V"
        first = tokens(1, 300)
        own, ours = own_hit_and_ours(engine, shard, first, first[:290] + tokens(2, 50))
        assert ours == own
        assert ours.cached == 256
