"""The cache's Ray actors, and how to reach them."""

from lmkv_ray.actors.cache import Cache
from lmkv_ray.actors.connect import connect
from lmkv_ray.orders import Drained
from lmkv_ray.status import CacheStatus, DirectoryStatus, EngineStatus, ShardStatus

__all__ = [
    "Cache",
    "CacheStatus",
    "DirectoryStatus",
    "Drained",
    "EngineStatus",
    "ShardStatus",
    "connect",
]
