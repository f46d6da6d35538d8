"""The vLLM connector.

``vllm serve MODEL --kv-transfer-config '{"kv_connector": "LmkvConnector", "kv_role": "kv_both",
"kv_connector_module_path": "lmkv_ray.vllm"}'``

``connector`` is the door: the class vLLM loads, which only distributes calls. The rooms say what
runs there: ``scheduler`` (the engine's thread: hits, saves), ``worker`` (vLLM's worker processes:
copies between the arena and the engine's pages), ``link`` (the thread that talks to a shard).
``identity`` (whose bytes these are) is read by the first; ``engine`` is what all know of vLLM.
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
    from lmkv_ray.vllm.engine.versions import check_version

    check_version()
    from lmkv_ray.vllm.connector import LmkvConnector

    return LmkvConnector
