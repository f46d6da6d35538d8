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


def make_adapter(directory: Path, model: str, seed: int) -> str:
    """Save a LoRA adapter of such a model, as PEFT does; again into the same path if it is there.

    Returns:
        its path.
    """
    import json

    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config: Any = LlamaConfig.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, heads in sizes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes = {"A": (8, config.hidden_size), "B": (heads * config.head_dim, 8)}
            for part, shape in shapes.items():
                weights[f"{at}.lora_{part}.weight"] = torch.randn(shape, generator=generator)
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": list(sizes),
    }
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return str(directory)
