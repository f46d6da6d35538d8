"""The namespace of an engine: everything besides the text that decides the bytes of its chunks."""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from typing import TYPE_CHECKING

from lmkv_ray.config import Settings
from lmkv_ray.keys import Namespace
from lmkv_ray.vllm.fingerprint import weights_fingerprint
from lmkv_ray.vllm.support import vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ACCELERATOR_CHUNK_TOKENS = 256

_NOT_PART_OF_THE_MODEL = frozenset({"_name_or_path", "transformers_version"})


def chunk_blocks(config: VllmConfig, settings: Settings) -> int:
    """Blocks in one chunk: the configured size rounded up to whole blocks.

    On a CPU the default is one block: recomputing a chunk's tail costs milliseconds a token there,
    copying in smaller pieces costs microseconds.
    """
    block_tokens: int = config.cache_config.block_size
    tokens = settings.chunk_tokens
    if tokens is None:
        on_cpu = config.device_config.device_type == "cpu"
        tokens = block_tokens if on_cpu else ACCELERATOR_CHUNK_TOKENS
    return -(-tokens // block_tokens)


def derive_namespace(config: VllmConfig, settings: Settings, *, layout: str) -> Namespace:
    """The namespace of this engine.

    Args:
        config: the engine's configuration.
        settings: for chunk size and salt.
        layout: digest of the workers' page layout, with whatever they pack by.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    hash_algorithm = str(cache.prefix_caching_hash_algo)
    weights = (
        f"dummy {model.seed}"
        if str(config.load_config.load_format) == "dummy"
        else weights_fingerprint(model.model, model.revision)
    )
    version = vllm_version()
    return Namespace(
        model=_model_digest(config),
        weights=weights,
        dtype=str(model.dtype),
        cache_dtype=str(cache.cache_dtype),
        layout=layout,
        block_tokens=cache.block_size,
        chunk_tokens=chunk_blocks(config, settings) * cache.block_size,
        hash_algorithm=f"{hash_algorithm} {os.environ.get('PYTHONHASHSEED', '')}",
        parallel=f"tp{parallel.tensor_parallel_size} pp{parallel.pipeline_parallel_size}",
        engine=f"vllm {version.major}.{version.minor}",
        salt=settings.salt,
    )


def _model_digest(config: VllmConfig) -> str:
    """Architecture, shape and overrides (RoPE scaling among them) of the model, as hex."""
    fields = {
        name: value
        for name, value in config.model_config.hf_config.to_dict().items()
        if name not in _NOT_PART_OF_THE_MODEL
    }
    shape = [fields, str(config.model_config.quantization), config.model_config.max_model_len]
    encoded = json.dumps(shape, sort_keys=True, default=repr)
    return blake2b(encoded.encode(), digest_size=16).hexdigest()
