"""Moving chunks between the arena and an engine's pages: on threads, or on a GPU's streams.

    engine = open_engine([layout], cache=address, cache_bytes=nbytes, settings=settings)
    engine.attach(ArenaReader.attach(path, arena_id), offsets=[0])
    engine.begin_loads([Load(arena_id, slots, generations, blocks)], idle=False)
    ...                                                         # the forward pass
    engine.begin_saves([Save(arena_id, slots, blocks, deadline)])
    for ended in engine.ended():
        ended.copy, ended.ok

What an engine promises: ``TransferEngine``.
"""

from lmkv_ray.transfer.base import Arena, Ended, Load, Save, TransferEngine
from lmkv_ray.transfer.device_engine import DeviceEngine
from lmkv_ray.transfer.host_engine import HostEngine
from lmkv_ray.transfer.open import Gpu, open_engine
from lmkv_ray.transfer.scratch import ScratchArena

__all__ = [
    "Arena",
    "DeviceEngine",
    "Ended",
    "Gpu",
    "HostEngine",
    "Load",
    "Save",
    "ScratchArena",
    "TransferEngine",
    "open_engine",
]
