"""The namespace of an engine: everything besides the text that decides the bytes of its chunks."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from lmkv_ray.config import Settings
from lmkv_ray.keys import Namespace
from lmkv_ray.vllm.fingerprint import weights_fingerprint
from lmkv_ray.vllm.groups import Group
from lmkv_ray.vllm.metadata import LayoutReport
from lmkv_ray.vllm.support import vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

ACCELERATOR_CHUNK_TOKENS = 256

_NOT_PART_OF_THE_MODEL = frozenset({"_name_or_path", "transformers_version"})


def chunk_tokens(config: VllmConfig, settings: Settings) -> int:
    """Tokens in one chunk, before rounding to whole blocks of a group.

    On a CPU the default is one block: recomputing a chunk's tail costs milliseconds a token there,
    copying in smaller pieces costs microseconds.
    """
    if settings.chunk_tokens is not None:
        return settings.chunk_tokens
    return 1 if config.device_config.device_type == "cpu" else ACCELERATOR_CHUNK_TOKENS


def derive_namespace(
    config: VllmConfig,
    settings: Settings,
    groups: Sequence[Group],
    reports: Sequence[LayoutReport],
    ranks: Sequence[int] | None = None,
) -> Namespace:
    """The namespace of this engine, or of its workers on one of several nodes.

    Args:
        config: the engine's configuration.
        settings: for the salt.
        groups: of the engine.
        reports: all workers' page layouts, with whatever they pack by, by rank.
        ranks: of the workers whose slices make up a chunk; None: all.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    weights = (
        f"dummy {model.seed}"
        if str(config.load_config.load_format) == "dummy"
        else weights_fingerprint(model.model, model.revision)
    )
    version = vllm_version()
    shape = f"tp{parallel.tensor_parallel_size} pp{parallel.pipeline_parallel_size}"
    cuts = (f"{group.block_tokens}x{group.blocks}" for group in groups[1:])
    return Namespace(
        model=_model_digest(config),
        weights=weights,
        dtype=str(model.dtype),
        cache_dtype=str(cache.cache_dtype),
        layout=" ".join([*(report.digest() for report in reports), *cuts]),
        block_tokens=groups[0].block_tokens,
        chunk_tokens=groups[0].tokens,
        hash_algorithm=hashing(str(cache.prefix_caching_hash_algo)),
        parallel=shape if ranks is None else f"{shape} ranks {' '.join(map(str, ranks))}",
        engine=f"vllm {version.major}.{version.minor}",
        salt=settings.salt,
    )


def hashing(algorithm: str) -> str:
    """How vLLM hashes blocks: the algorithm and its seed.

    vLLM seeds xxhash, which is no cryptographic hash, at random unless it is told a seed.
    """
    seed = os.environ.get("PYTHONHASHSEED", "")
    if algorithm.startswith("xxhash") and not seed:
        logger.warning(
            "lmkv_ray: with prefix_caching_hash_algo=%s and no PYTHONHASHSEED every process names "
            "blocks in its own way: what this engine saves no other one finds, nor does it after a "
            "restart. Set PYTHONHASHSEED to one value everywhere, or use sha256.",
            algorithm,
        )
    return f"{algorithm} {seed}"


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
