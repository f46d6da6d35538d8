"""What is supported, said at start in one sentence.

Refusing is part of the contract: a cache that serves wrong bytes for a model it does not understand
is worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmkv_ray.anywhere.rope import NO_ROPE
from lmkv_ray.arena.processor import check_processor
from lmkv_ray.errors import UnsupportedError
from lmkv_ray.host import host_id
from lmkv_ray.vllm.engine.versions import FAILED_LOADS_SINCE, vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from lmkv_ray.vllm.engine.groups import Group
    from lmkv_ray.vllm.engine.metadata import LayoutReport

IN_PLACE_SPECS = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
"""vLLM's names of KV-cache kinds that need all blocks of a request, each at its position."""

SUPPORTED_DEVICES = ("cpu", "cuda")
"""vLLM's names; AMD GPUs are ``cuda`` too. The GPU path was never run on one by its authors: its
kernels and its order of events are proven on the host, and every start tests itself."""

SUPPORTED_SPECS = IN_PLACE_SPECS | {"SlidingWindowSpec", "ChunkedLocalAttentionSpec"}
"""vLLM's names of KV-cache kinds that were tested (``groups`` knows what they need)."""


def check_engine(config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse engines whose chunks this version cannot keep apart or put back.

    Raises:
        UnsupportedError: naming the model, the feature and what to do.
    """
    check_processor()
    model = config.model_config.model
    parallel = config.parallel_config
    kinds = {type(spec).__name__ for spec in layer_specs(kv_cache_config)}
    if not kinds <= SUPPORTED_SPECS:
        raise UnsupportedError(
            f"{model} keeps its KV cache as {', '.join(sorted(kinds - SUPPORTED_SPECS))}; lmkv_ray "
            f"supports {', '.join(sorted(SUPPORTED_SPECS))}.",
            next_step="Serve this model without lmkv_ray.",
        )
    hybrid = len(kv_cache_config.kv_cache_groups) > 1 or not kinds <= IN_PLACE_SPECS
    refused = {
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dynamic KV scales (calculate_kv_scales)": getattr(
            config.cache_config, "calculate_kv_scales", False
        ),
        f"the device {config.device_config.device_type} (only {', '.join(SUPPORTED_DEVICES)})": (
            config.device_config.device_type not in SUPPORTED_DEVICES
        ),
        "scales of the image encoder from a file (mm_encoder_fp8_scale_path)": bool(
            getattr(
                getattr(config.model_config, "multimodal_config", None),
                "mm_encoder_fp8_scale_path",
                None,
            )
        ),
        "sliding windows and several KV groups with speculative decoding": (
            hybrid and config.speculative_config is not None
        ),
        f"sliding windows and several KV groups on vLLM below {FAILED_LOADS_SINCE}": (
            hybrid and vllm_version() < FAILED_LOADS_SINCE
        ),
    }
    for feature, used in refused.items():
        if used:
            raise UnsupportedError(
                f"{model}: lmkv_ray does not support {feature} yet.",
                next_step="Turn it off, or remove --kv-transfer-config to serve without lmkv_ray.",
            )


def why_not_anywhere(config: VllmConfig, groups: Sequence[Group]) -> str:
    """Why text is reused as a prefix only by this engine; empty: nothing is against it.

    What stands here is known of the configuration; the workers know more (``rope_of``).
    """
    model, parallel = config.model_config, config.parallel_config
    text = model.hf_config.get_text_config()
    without = next((name for name in NO_ROPE if getattr(text, name, None)), None)
    refused = {
        "several KV groups": len(groups) > 1,
        "a sliding window": not all(group.full for group in groups),
        "latent attention (MLA)": bool(getattr(model, "use_mla", False)),
        "speculative decoding": config.speculative_config is not None,
        "micro-batches": bool(getattr(parallel, "enable_dbo", False))
        or getattr(parallel, "num_ubatches", 0) > 1,
        "images": bool(getattr(model, "is_multimodal_model", False)),
        f"layers without positions ({without})": without is not None,
        f"a KV cache of type {config.cache_config.cache_dtype}": (
            config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32")
        ),
        f"the device {config.device_config.device_type}": (
            config.device_config.device_type != "cpu"
        ),
        "max_num_seqs 1": config.scheduler_config.max_num_seqs < 2,
    }
    reason = next((name for name, used in refused.items() if used), None)
    return f"{reason} is not supported with it" if reason else ""


def check_workers(config: VllmConfig, reports: Sequence[LayoutReport]) -> None:
    """Refuse engines that have no worker beside them: there, chunks are looked up.

    Args:
        config: vLLM's configuration of the engine.
        reports: of all workers, by rank.

    Raises:
        UnsupportedError: all of them run on other nodes, or in other containers.
    """
    assert [report.rank for report in reports] == list(range(len(reports))), "a worker is missing"
    if all(report.host != host_id() for report in reports):
        raise UnsupportedError(
            f"{config.model_config.model}: lmkv_ray does not support an engine on a node without "
            "any of its workers yet.",
            next_step="Put the engine with one of its workers, in one pid namespace, or serve "
            "without lmkv_ray.",
        )


def kv_replicas(config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Consecutive workers whose pages hold the same bytes, so that one copy of them is enough."""
    told: int | None = getattr(kv_cache_config, "kv_tp_replicas", None)
    if told is not None:
        return told
    latent = {type(spec).__name__ for spec in layer_specs(kv_cache_config)} == {"MLAAttentionSpec"}
    ranks: int = config.parallel_config.tensor_parallel_size
    return ranks if latent else 1


def layer_specs(kv_cache_config: KVCacheConfig) -> list[Any]:
    """What vLLM says of each kind of layer, of all groups."""
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    return [s for spec in specs for s in getattr(spec, "kv_cache_specs", {"": spec}).values()]
