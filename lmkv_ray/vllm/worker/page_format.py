"""How an attention backend packs keys and values into a page: what strides and layout names hide.

vLLM names the order of a cache's dimensions, but some backends put bytes in an order of their own
inside a page: AMD's AITER backend shuffles them on demand, the native ROCm one packs 16 bytes of
each head side by side, and a third of AMD's with the very same shapes does neither. So the name of
what writes a page is part of the namespace, unless its source was read and it is ``PLAIN``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lmkv_ray.vllm.engine.versions import vllm_version

_BACKENDS = "vllm.v1.attention.backends"
_AITER = f"{_BACKENDS}.rocm_aiter_fa.AiterFlashAttentionImpl.do_kv_cache_update"

PLAIN = frozenset(
    {
        # `reshape_and_cache_flash` into kv_cache.transpose(1, 2).split(head_size, dim=-1): of each
        # token and head the key, then the value. Each scales by the layer's own two scales.
        f"{_BACKENDS}.flash_attn.FlashAttentionImpl.do_kv_cache_update",
        f"{_BACKENDS}.flashinfer.FlashInferImpl.do_kv_cache_update",
        f"{_BACKENDS}.flex_attention.FlexAttentionImpl.do_kv_cache_update",
        f"{_BACKENDS}.rocm_aiter_unified_attn.RocmAiterUnifiedAttentionImpl.do_kv_cache_update",
        _AITER,  # unless it shuffles
        # The same by a Triton kernel, `triton_reshape_and_cache_flash`.
        f"{_BACKENDS}.triton_attn.TritonAttentionImpl.do_kv_cache_update",
        # Packs by the instruction set, which ``WorkerHalf.layout_report`` names.
        f"{_BACKENDS}.cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update",
        # `concat_and_cache_mla`: of each token the latent, then the rotated key. All backends for
        # latent attention inherit it but those for CPUs.
        "vllm.v1.attention.backend.MLAAttentionImpl.do_kv_cache_update",
    }
)
"""What writes the same bytes for the same layout, key and value, in vLLM 0.32.

Not here: ``RocmAttentionImpl`` (packs 16 bytes side by side), ``RocmSegmentedAttentionImpl`` and
``B12xPagedAttentionImpl`` (all keys of a token, then all values), ``HpcAttentionImpl`` (writes in a
fused kernel), TurboQuant and UltraQuant, state-space layers, and what was not read.
"""

READ_IN = (0, 32)
"""The version of vLLM whose source the table is from. Others' chunks are apart anyway."""

_PLAIN_DTYPES = frozenset({"auto", "float16", "half", "bfloat16", "float32", "float"})
_LAYERS = "vllm.model_executor.layers.attention."
"""Where layers are that leave the writing to their backend; a model's own layers may write."""


@dataclass(frozen=True, slots=True)
class Platform:
    """What packing depends on besides the backend."""

    name: str
    """vLLM's: cpu, cuda, rocm."""
    fp8: str
    """The format of 8-bit floats: AMD's MI300 has one of its own."""
    shuffles: bool
    """AMD's AITER backend shuffles pages (VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT)."""
    version: tuple[int, int]
    """Of vLLM."""


def this_platform() -> Platform:
    """The platform of this process."""
    from vllm.platforms import current_platform

    shuffles = False
    if current_platform.is_rocm():
        from vllm._aiter_ops import rocm_aiter_ops

        shuffles = bool(getattr(rocm_aiter_ops, "is_shuffle_kv_cache_enabled", bool)())
    version = vllm_version()
    return Platform(
        "rocm" if current_platform.is_rocm() else str(current_platform.device_type),
        str(current_platform.fp8_dtype()),
        shuffles,
        (version.major, version.minor),
    )


def packing_of(layers: Iterable[Any], platform: Platform) -> str:
    """Equal for engines whose backends fill pages of one layout alike; empty where they are plain.

    Args:
        layers: vLLM's attention layers in the order of their pages.
        platform: where they run.
    """
    kinds = (_kind(layer, platform) for layer in layers)
    return " ".join(kind for kind, _ in groupby(kinds) if kind)


def _kind(layer: Any, platform: Platform) -> str:
    impl, dtype = getattr(layer, "impl", None), str(getattr(layer, "kv_cache_dtype", "auto"))
    fp8 = platform.fp8 if dtype.startswith("fp8") else ""
    writer = _name(getattr(type(impl), "do_kv_cache_update", None))
    plain = (
        platform.version == READ_IN
        and writer in PLAIN
        and type(layer).__module__.startswith(_LAYERS)
        and (dtype in _PLAIN_DTYPES or dtype in ("fp8", "fp8_e4m3", "fp8_e5m2"))
        and not (platform.shuffles and writer == _AITER)
    )
    if plain:
        return fp8
    backend = layer.get_attn_backend() if hasattr(layer, "get_attn_backend") else None
    shuffled = "shuffled" if platform.shuffles else ""
    # Of 4-bit floats FlashInfer has two packings, by the kernel that a GPU can run.
    fa2 = "fa2" if getattr(impl, "nvfp4_fa2", False) else ""
    called = backend.get_name() if backend is not None else ""  # composed ones have one class
    names = (_name(type(layer)), _name(backend), called, writer)
    return ",".join(filter(None, (platform.name, *names, fp8, shuffled, fa2)))


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}" if thing is not None else ""
