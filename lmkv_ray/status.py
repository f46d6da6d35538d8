"""The state of a cache, as its services tell it to people."""

from __future__ import annotations

import msgspec

from lmkv_ray.messages import Kin, Message


class TierStatus(Message, frozen=True):
    """One tier of one node, for people."""

    name: str
    chunks: int
    """-1: not known (a shared store counts nothing for us)."""
    nbytes: int
    """Bytes it takes, -1 if not known."""
    capacity: int
    """Bytes it may take; -1: unbounded."""
    problem: str | None
    """Why it is out of use at present, and what to do."""
    counters: dict[str, int]
    """Since the shard started."""


class EngineStatus(Message, frozen=True):
    """An engine that is attached to a shard."""

    engine_id: str
    model: str
    slots: int
    """Slots it is granted and has not filled yet."""
    device_chunks: int = 0
    """Chunks in its own prefix cache."""


class ShardStatus(Message, frozen=True):
    """One node of the cache."""

    node_id: str
    pid: int
    capacity: int = 0
    """Bytes of the arena; 0 if there is none."""
    chunks: int = 0
    nbytes: int = 0
    """Bytes of all chunks."""
    pinned: int = 0
    """Chunks that are not evicted to make room."""
    engines: list[EngineStatus] = msgspec.field(default_factory=list)
    counters: dict[str, float] = msgspec.field(default_factory=dict)
    """Since the shard started; see ``shard.Counters`` and ``staging.StageCounters``."""
    tiers: list[TierStatus] = msgspec.field(default_factory=list)
    draining: bool = False
    """Whether the node is about to leave."""
    problem: str | None = None
    """Why the shard does not work, and what to do."""
    kin: list[Kin] = msgspec.field(default_factory=list)
    """One of each namespace of its engines."""
    taken: str = ""
    """What memory the shard took, and why."""
    refusals: list[str] = msgspec.field(default_factory=list)
    """Why engines of this node are served without cache, and what to do."""
    host: str = ""
    """What the machine or container calls itself."""
    version: str = ""
    """Of lmkv_ray, Ray and Python, in one text."""
    wall: float = 0.0
    """The node's clock when it answered, in seconds since 1970."""

    @property
    def name(self) -> str:
        """For people: the host's name, and the beginning of the node's id."""
        return f"{self.host} ({self.node_id[:12]})" if self.host else self.node_id[:12]


class DirectoryStatus(Message, frozen=True):
    """One part of the directory."""

    part: int
    nodes: int
    unsynced: int
    """Nodes whose whole content it has not been told yet."""
    chunks: int
    """Distinct chunks it knows."""
    capacity: int
    """Chunks it can remember."""


class CacheStatus(Message, frozen=True):
    """The whole cache, as far as its shards answered."""

    nodes: list[ShardStatus]
    silent: list[str]
    """Nodes whose shard did not answer in time."""
    directory: list[DirectoryStatus]
    """Its parts, as far as they answered."""

    @property
    def directory_chunks(self) -> int:
        """Distinct chunks the directory knows."""
        return sum(part.chunks for part in self.directory)

    @property
    def chunks(self) -> int:
        """Chunks on all nodes; one that is on two nodes counts twice."""
        return sum(node.chunks for node in self.nodes)

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(node.nbytes for node in self.nodes)

    @property
    def capacity(self) -> int:
        """Bytes of all arenas."""
        return sum(node.capacity for node in self.nodes)

    @property
    def engines(self) -> int:
        """Attached engines."""
        return sum(len(node.engines) for node in self.nodes)

    @property
    def device_chunks(self) -> int:
        """Chunks in the prefix caches of all engines."""
        return sum(engine.device_chunks for node in self.nodes for engine in node.engines)
