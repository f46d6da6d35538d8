"""The vLLM connector.

``vllm serve MODEL --kv-transfer-config '{"kv_connector": "LmkvConnector", "kv_role": "kv_both",
"kv_connector_module_path": "lmkv_ray.vllm"}'``

Two halves behind one class: ``scheduler`` (engine process: keys, hits, grants) and ``worker``
(copies between the arena and the engine's pages). ``link`` is the only part that talks to Ray, on a
thread of its own.
"""

from lmkv_ray.vllm.support import check_version

check_version()

from lmkv_ray.vllm.connector import LmkvConnector  # noqa: E402  (only importable on such a vLLM)

__all__ = ["LmkvConnector"]
