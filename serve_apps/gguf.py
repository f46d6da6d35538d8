"""A GGUF file of a llama model, as a Hugging Face model directory.

vLLM and transformers load the result; neither is needed to make it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# GGUF name inside a block -> Hugging Face name inside a layer.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN = 3  # ggml's token type of <|im_start|> and the like


def convert(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the model of the GGUF file `source` into the existing directory `target`.

    Raises ValueError for an architecture or a tokenizer this module does not know.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(
            f"{source}: architecture {fields['general.architecture']!r}; only llama is converted"
        )
    tokenizer = _tokenizer(fields)
    weights = {
        name: torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        for name, values in _tensors(reader, fields)
    }
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors makes it private
    tokenizer.save(str(target / "tokenizer.json"))
    template = fields["tokenizer.chat_template"]
    (target / "chat_template.jinja").write_text(template)
    special = {
        f"{name}_token_id": fields[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    tied = "lm_head.weight" not in weights
    for name, content in (
        ("config.json", _model_config(fields, dtype, tied) | special),
        ("generation_config.json", special),
        ("tokenizer_config.json", _tokenizer_config(fields, special)),
    ):
        (target / name).write_text(json.dumps(content, indent=2))


def _tensors(
    reader: GGUFReader, fields: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Every weight as (Hugging Face name, float32 array)."""
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if tensor.name in MODEL_TENSORS:
            yield MODEL_TENSORS[tensor.name], values
        elif tensor.name.startswith("blk."):
            _, layer, name, kind = tensor.name.split(".")
            if name in heads:
                values = _restore_rotary_halves(values, heads[name])
            yield f"model.layers.{layer}.{LAYER_TENSORS[name]}.{kind}", values


def _restore_rotary_halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's interleaving of the two rotary halves of each head.

    weight: (heads * head_dim, hidden), before and after.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _model_config(fields: Mapping[str, Any], dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    def llama(name: str) -> Any:
        return fields[f"llama.{name}"]

    heads, hidden = llama("attention.head_count"), llama("embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "max_position_embeddings": llama("context_length"),
        "rope_theta": float(llama("rope.freq_base")),
        # GGUF holds it as float32: 9.99999974e-06 is 1e-05.
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):.3g}"),
        "tie_word_embeddings": tied,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Without it transformers 5 warns, wrongly, of a bad Mistral regex.
        "transformers_version": "5.0.0",
    }


def _tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(
            f"pre-tokenizer {fields['tokenizer.ggml.pre']!r}; only smollm is converted"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    # SmolLM2 was trained with every digit a token of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer


def _tokenizer_config(fields: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": fields["tokenizer.chat_template"],
    } | {name.removesuffix("_id"): tokens[index] for name, index in special.items()}
