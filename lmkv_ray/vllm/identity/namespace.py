"""The namespace of an engine: everything besides the text that decides the bytes of its chunks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmkv_ray.config import Settings
from lmkv_ray.keys import Namespace
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.metadata import LayoutReport
from lmkv_ray.vllm.engine.versions import vllm_version
from lmkv_ray.vllm.identity.model_config import length, model_fields, options, quantization

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


def derive_namespace(
    config: VllmConfig,
    settings: Settings,
    groups: Sequence[Group],
    reports: Sequence[LayoutReport],
    ranks: Sequence[int] | None = None,
) -> Namespace:
    """The namespace of this engine, or of its workers on one of several nodes.

    What must be read from files is still missing in it (``lmkv_ray.vllm.identity.content``).

    Args:
        config: the engine's configuration.
        settings: for the salt.
        groups: the engine's KV groups, in its order.
        reports: all workers' page layouts, with whatever they pack by, by rank.
        ranks: of the workers whose slices make up a chunk; None: all.

    Raises:
        UnsupportedError: a part of the configuration cannot be read.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    version = vllm_version()
    shape = f"tp{parallel.tensor_parallel_size} pp{parallel.pipeline_parallel_size}"
    cuts = (f"{group.block_tokens}x{group.blocks}" for group in groups[1:])
    return Namespace(
        model=model_fields(model),
        quantization=quantization(model),
        length=length(model),
        options=options(config),
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
