"""Which node holds which chunk: pure, no I/O. A hint, never the truth; shards have that."""

from lmkv_ray.directory.clears import ClearLog
from lmkv_ray.directory.handoff import Held, Order, plan_handoff
from lmkv_ray.directory.holdings import GPU, MEMORY, Holding, Location, merge
from lmkv_ray.directory.parts import positions_by_part
from lmkv_ray.directory.state import DirectoryState, NodeStatus
from lmkv_ray.directory.table import ChunkTable

__all__ = [
    "GPU",
    "MEMORY",
    "ChunkTable",
    "ClearLog",
    "DirectoryState",
    "Held",
    "Holding",
    "Location",
    "NodeStatus",
    "Order",
    "merge",
    "plan_handoff",
    "positions_by_part",
]
