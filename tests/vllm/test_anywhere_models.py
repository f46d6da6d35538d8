"""Keys are turned right, for each architecture that is said to be tested.

With one layer, keys and values depend on token and position only: there, text that is reused at any
position gives what a cold run gives, but for rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmkv_ray.anywhere.rope import TESTED
from lmkv_ray.vllm.scheduler.anywhere import SCHEDULER
from tests.vllm.conftest import engine_on, forget, save_prompt
from tests.vllm.local_shard import LocalShard
from tests.vllm.models import VOCABULARY
from tests.vllm.stored_text import ToldFinder
from tests.vllm.test_anywhere import (
    DOCUMENTS,
    ask,
    forget_device,
    logits,
    prompt,
    set_finder,
    told,
)

pytestmark = pytest.mark.vllm

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "LlamaForCausalLM llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "MistralForCausalLM": ("MistralConfig", {"sliding_window": None}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen2ForCausalLM yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "Qwen3ForCausalLM": ("Qwen3Config", {}),
}


def make(directory: Path, name: str) -> str:
    """Save a model of one layer."""
    import torch
    import transformers

    architecture = name.split()[0]
    config, fields = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        initializer_range=0.25,
        tie_word_embeddings=False,
        **fields,
    )
    getattr(transformers, architecture)(made).to(torch.float32).save_pretrained(directory)
    return str(directory)


def test_each_architecture_is_tried() -> None:
    assert {name.split()[0] for name in MODELS} == TESTED


@pytest.mark.parametrize("name", MODELS)
def test_reused_text_is_a_cold_run(tmp_path: Path, shard: LocalShard, name: str) -> None:
    asked = prompt("31420", between=7)
    with engine_on(
        shard,
        make(tmp_path, name),
        connector={"anywhere": "all"},
        scheduler_cls=SCHEDULER,
        max_num_batched_tokens=2048,
        max_logprobs=VOCABULARY,
    ) as engine:
        forget(engine, shard)
        expected = logits(ask(engine, asked, None))
        forget(engine, shard)
        finder = ToldFinder(engine.connector()._link.readable, DOCUMENTS)
        save_prompt(engine, prompt("01234"))
        finder.learn(engine, prompt("01234"))
        forget_device(engine)
        set_finder(engine, finder)
        output = ask(engine, asked, None)
        assert told(output)["reused"] > 500
        assert output.outputs[0].token_ids
        made = logits(output)
        worst = max(
            abs(a[token] - b[token]) for a, b in zip(made, expected, strict=True) for token in a
        )
        assert worst < 2e-3, worst
