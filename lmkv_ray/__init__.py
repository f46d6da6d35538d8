"""lmkv_ray: the KV cache layer of Ray.

    import lmkv_ray

    cache = lmkv_ray.connect()
    print(cache.status())

Engines join by vLLM's ``--kv-transfer-config``, see ``lmkv_ray.vllm``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmkv_ray.config import Settings, load_settings
from lmkv_ray.errors import (
    ArenaError,
    ConfigError,
    ConnectError,
    LmkvError,
    TransportError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from lmkv_ray.actors import Cache, connect

__version__ = "0.1.0"

__all__ = [
    "ArenaError",
    "Cache",
    "ConfigError",
    "ConnectError",
    "LmkvError",
    "Settings",
    "TransportError",
    "UnsupportedError",
    "connect",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    # Only these need Ray: the arena and the state machines are imported without it.
    if name in ("Cache", "connect"):
        from lmkv_ray import actors

        return getattr(actors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
