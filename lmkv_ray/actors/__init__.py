"""The cache's Ray actors, and how to reach them."""

from lmkv_ray.actors.cache import Cache
from lmkv_ray.actors.connect import connect
from lmkv_ray.actors.wire import CacheStatus, DirectoryStatus, Drained, EngineStatus, ShardStatus

__all__ = [
    "Cache",
    "CacheStatus",
    "DirectoryStatus",
    "Drained",
    "EngineStatus",
    "ShardStatus",
    "connect",
]
