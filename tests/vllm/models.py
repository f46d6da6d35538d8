"""Small models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 1024

SLIDING: dict[str, Any] = {
    "sliding_window": 100,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
"""Of a model with two KV groups, of which one forgets."""


def make_model(directory: Path, dtype: str, *, seed: int = 0, **config_fields: Any) -> str:
    """Save a small Llama with wide random weights: corrupted KV changes its tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        initializer_range=0.25,
        **config_fields,
    )
    path = directory / f"llama-{dtype}"
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    return str(path)
