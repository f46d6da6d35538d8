"""What an engine cannot do that is to reuse text anywhere is said in one line."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.stats import LmkvStats
from lmkv_ray.vllm.scheduler.anywhere import SCHEDULER, open_anywhere

FULL = Group(0, block_tokens=32, blocks=1, hash_tokens=32)
WINDOW = Group(0, block_tokens=32, blocks=1, hash_tokens=32, window=100)


def config(**changes: Any) -> Any:
    """Of vLLM, one for which nothing is refused, with changes."""
    text = SimpleNamespace(**changes.pop("text", {}))
    fields: dict[str, Any] = {
        "model_config": SimpleNamespace(
            hf_config=SimpleNamespace(get_text_config=lambda: text), use_mla=False
        ),
        "parallel_config": SimpleNamespace(),
        "speculative_config": None,
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "device_config": SimpleNamespace(device_type="cpu"),
        "scheduler_config": SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=512),
    }
    return SimpleNamespace(**(fields | changes))


def opened(
    mode: str = "asked",
    *,
    groups: Any = (FULL,),
    rows: bool = True,
    no_moves: str = "",
    hosts: int = 1,
    **changes: Any,
) -> Any:
    reports: Any = [SimpleNamespace(host=str(i), no_moves=no_moves) for i in range(hosts)]
    settings = load_settings({"anywhere": mode})
    return open_anywhere(config(**changes), settings, groups, reports, LmkvStats(), rows=rows)


def test_it_is_off_unless_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    assert load_settings().anywhere == "off"
    assert opened("off", rows=False) is None
    assert not caplog.records
    limits = opened().composer.limits
    assert (limits.rows, limits.tokens) == (7, 256)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rows": False}, f"without --scheduler-cls {SCHEDULER}"),
        ({"groups": (FULL, FULL)}, "several KV groups"),
        ({"groups": (WINDOW,)}, "a sliding window"),
        ({"hosts": 2}, "several nodes"),
        ({"no_moves": "NewForCausalLM was not tested for it"}, "NewForCausalLM was not tested"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"cache_config": SimpleNamespace(cache_dtype="fp8")}, "type fp8"),
        ({"device_config": SimpleNamespace(device_type="cuda")}, "the device cuda"),
        ({"parallel_config": SimpleNamespace(enable_dbo=True)}, "micro-batches"),
        ({"text": {"no_rope_layers": [1, 0]}}, "layers without positions (no_rope_layers)"),
    ],
)
def test_a_refusal_is_one_line(
    caplog: pytest.LogCaptureFixture, changes: dict[str, Any], why: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert opened(**changes) is None
    [record] = caplog.records
    assert why in record.getMessage()
    assert "text is reused as a prefix only" in record.getMessage()
