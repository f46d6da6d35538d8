"""What is supported, said at start in one sentence.

Refusing is part of the contract: a cache that serves wrong bytes for a model it does not understand
is worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmkv_ray.arena.processor import check_processor
from lmkv_ray.errors import UnsupportedError
from lmkv_ray.host import host_id
from lmkv_ray.vllm.engine.versions import FAILED_LOADS_SINCE, vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

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
