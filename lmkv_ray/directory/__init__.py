"""Which node holds which chunk: pure, no I/O. A hint, never the truth; shards have that."""

from lmkv_ray.directory.state import DirectoryState, Holding, NodeStatus
from lmkv_ray.directory.table import ChunkTable

__all__ = ["ChunkTable", "DirectoryState", "Holding", "NodeStatus"]
