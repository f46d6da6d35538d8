"""The parts of vLLM's configuration that decide the bytes of a KV cache, as texts."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from lmkv_ray.identity import canonical

NOT_PART_OF_THE_MODEL = frozenset(
    {"_name_or_path", "_commit_hash", "transformers_version", "max_model_len"}
)
"""Entries of a model's configuration, at any depth. The length is judged by ``length``."""

OPTIONS = (
    "additional_config",
    "attention_config.disable_flashinfer_q_quantization",
    "attention_config.indexer_kv_dtype",
    "attention_config.indexer_sparse_logits",
    "attention_config.use_non_causal",
    "attention_config.use_prefill_query_quantization",
    "cache_config.kv_cache_dtype_skip_layers",
    "device_config.device_type",
    "diffusion_config.canvas_length",
    "diffusion_config.max_denoising_steps",
    "kernel_config.linear_backend",
    "kernel_config.linear_backend_per_quant",
    "kernel_config.moe_backend",
    "lora_config.enable_tower_connector_lora",
    "lora_config.lora_dtype",
    "lora_config.target_modules",
    "model_config.convert",
    "model_config.disable_sliding_window",
    "model_config.model_class_overrides",
    "model_config.model_impl",
    "model_config.multimodal_config.allow_missing_mm_embeddings",
    "model_config.multimodal_config.media_io_kwargs",
    "model_config.multimodal_config.mm_device_do_normalize",
    "model_config.multimodal_config.mm_encoder_attn_dtype",
    "model_config.multimodal_config.mm_processor_kwargs",
    "model_config.multimodal_config.video_pruning_method",
    "model_config.multimodal_config.video_pruning_rate",
    "model_config.runner",
    "parallel_config.all2all_backend",
    "parallel_config.worker_cls",
    "speculative_config.index_share_for_mtp_iteration",
    "speculative_config.kv_cache_dtype",
    "speculative_config.moe_backend",
    "speculative_config.parallel_drafting",
    "speculative_config.use_heterogeneous_vocab",
)
"""Fields of ``VllmConfig`` that are taken as they are. ``tests/vllm/test_fields.py`` has a verdict
on every other field."""

_LENGTH_FREE_ROPE = frozenset(
    {"default", "linear", "yarn", "llama3", "mrope", "mllama4", "proportional"}
    | {"deepseek_yarn", "deepseek_llama_scaling", "bailing_mrope"}
)

DRAFTS_WITHOUT_KV = frozenset({"ngram", "ngram_gpu", "suffix", "custom_class"})
"""vLLM's methods of speculation that store no KV of their own."""

AUTO = -1
"""VLLM's ``max_model_len``: as long as fits."""

LLAMA4_LONG = 32768
"""A Llama 4 that may read more tokens tunes the temperature of its attention."""


def options(config: Any) -> dict[str, str]:
    """The fields that were set, of ``OPTIONS``.

    Raises:
        UnsupportedError: see ``canonical``.
    """
    found = {path: _value(config, path) for path in OPTIONS}
    if (draft := draft_of(config)) is not None:
        of_draft = [model_fields(draft), quantization(draft), length(draft), str(draft.dtype)]
        found["speculative_config.draft_model_config"] = of_draft
    return {
        path: _short(canonical(value, path))
        for path, value in found.items()
        if value is not None and value != {} and value != []
    }


def draft_of(config: Any) -> Any:
    """VLLM's ``ModelConfig`` of the draft model whose KV is stored too, if there is one."""
    speculation = getattr(config, "speculative_config", None)
    if getattr(speculation, "method", None) in DRAFTS_WITHOUT_KV:
        return None
    return getattr(speculation, "draft_model_config", None)


def model_fields(model: Any) -> str:
    """Architecture, shape and overrides of a model, as a digest.

    Args:
        model: vLLM's ``ModelConfig``.

    Raises:
        UnsupportedError: see ``canonical``.
    """
    fields = canonical(_stripped(model.hf_config.to_dict()), "hf_config")
    return blake2b(fields.encode(), digest_size=16).hexdigest()


def quantization(model: Any) -> str:
    """How a model's weights are quantized while they are loaded.

    Raises:
        UnsupportedError: see ``canonical``.
    """
    name, details = model.quantization, getattr(model, "quantization_config", None)
    if not details:
        return str(name or "")
    return f"{name} {_short(canonical(details, 'quantization_config'))}"


def length(model: Any) -> str:
    """The longest text, as far as it changes what shorter ones are computed to.

    If vLLM was told to find the length that fits its memory, the model was built before that was
    known, for the longest that its configuration allows.
    """
    fields, longest = model.hf_config.to_dict(), model.max_model_len
    fitted = getattr(model, "original_max_model_len", None) == AUTO
    found = set()
    for rope in _ropes(fields):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "longrope":
            original = rope.get(
                "original_max_position_embeddings", fields.get("original_max_position_embeddings")
            )
            long = original is None or longest > original
            found.add(str(longest) if original is None else f"{'long' if long else 'short'} rope")
        elif kind not in _LENGTH_FREE_ROPE:
            found.add(str(longest))
    if str(fields.get("model_type", "")).startswith("llama4"):
        found.add("long" if longest > LLAMA4_LONG else "short")
    return " ".join(sorted({"of the configuration"} if found and fitted else found))


def _ropes(fields: Any) -> Iterator[dict[str, Any]]:
    """All descriptions of rotary embeddings in a model's configuration."""
    if isinstance(fields, dict):
        for key, value in fields.items():
            if isinstance(value, dict):
                if "rope_type" in value or (key == "rope_scaling" and "type" in value):
                    yield value
                yield from _ropes(value)
    elif isinstance(fields, list | tuple):
        for value in fields:
            yield from _ropes(value)


def _stripped(fields: Any) -> Any:
    if isinstance(fields, dict):
        return {k: _stripped(v) for k, v in fields.items() if k not in NOT_PART_OF_THE_MODEL}
    return [_stripped(v) for v in fields] if isinstance(fields, list | tuple) else fields


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _short(text: str) -> str:
    return text if len(text) <= 64 else blake2b(text.encode(), digest_size=16).hexdigest()
