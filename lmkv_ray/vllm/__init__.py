"""The vLLM connector.

``vllm serve MODEL --kv-transfer-config '{"kv_connector": "LmkvConnector", "kv_role": "kv_both",
"kv_connector_module_path": "lmkv_ray.vllm"}'``

Two halves behind one class: ``scheduler`` (engine process: keys, hits, grants) and ``worker``
(copies between the arena and the engine's pages). ``link`` is the only part that talks to Ray, on a
thread of its own; it and ``shard_client`` need no vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmkv_ray.vllm.connector import LmkvConnector

__all__ = ["LmkvConnector"]


def __getattr__(name: str) -> object:
    """Import the connector, and vLLM with it, when vLLM asks for it.

    Raises:
        UnsupportedError: vLLM is missing, or of a version that is not supported.
    """
    if name != "LmkvConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmkv_ray.vllm.versions import check_version

    check_version()
    from lmkv_ray.vllm.connector import LmkvConnector

    return LmkvConnector
