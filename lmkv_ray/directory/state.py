"""What the directory knows, as a state machine without I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lmkv_ray.directory.table import NOBODY, ChunkTable
from lmkv_ray.keys import KEY_BYTES, KeyArray, key_array
from lmkv_ray.messages import Delta, DeltaReply, Message


class Holding(Message, frozen=True):
    """Directory to shard: what one other node holds of a run of chunks."""

    node_id: str
    run: int
    """Leading chunks of the request that it holds without a gap."""
    positions: list[int]
    """All chunks of the request that it holds, ascending."""


class NodeStatus(Message, frozen=True):
    """What the directory knows about a node."""

    node_id: str
    chunks: int
    synced: bool
    """False while the directory waits for the node's whole content."""
    age: float
    """Seconds since the node's shard was last heard."""


@dataclass(slots=True)
class _Node:
    number: int
    epoch: int = -1
    seq: int = 0
    synced: bool = False
    heard: float = -math.inf


class DirectoryState:
    """Chunk -> nodes, fed by the shards' deltas.

    A shard's deltas count only as long as none is missing: after a gap, or from a new life of the
    shard, the directory keeps what it knew (hints, which may be stale) and asks for a
    snapshot until one comes.

    Args:
        capacity: chunks it remembers at most.
    """

    def __init__(self, capacity: int) -> None:
        self.table = ChunkTable(capacity)
        self._nodes: dict[str, _Node] = {}
        self._names: dict[int, str] = {}

    def delta(self, delta: Delta, now: float) -> DeltaReply:
        """A shard's news. Any delta may be lost, repeated, late or lying.

        Raises:
            ValueError: the keys are not whole.
        """
        if (len(delta.added) | len(delta.removed)) % KEY_BYTES:
            raise ValueError("keys of a delta are 16 bytes each")
        node = self._nodes.get(delta.node_id) or self._new_node(delta.node_id)
        node.heard = now
        same_life = delta.epoch == node.epoch
        if same_life and delta.seq <= node.seq:
            pass  # late or repeated: what it said is known already
        elif delta.snapshot:
            self.table.drop_node(node.number)
            self.table.add(key_array(delta.added), node.number)
            node.epoch, node.seq, node.synced = delta.epoch, delta.seq, True
        elif same_life and node.synced and delta.seq == node.seq + 1:
            self.table.remove(key_array(delta.removed), node.number)
            self.table.add(key_array(delta.added), node.number)
            node.seq = delta.seq
        else:
            node.synced = False
        return DeltaReply(resync=not node.synced, peers=self.peers(delta.node_id))

    def node_lost(self, node_id: str) -> None:
        """A node died: nobody can get anything from it."""
        node = self._nodes.pop(node_id, None)
        if node is not None:
            self.table.drop_node(node.number)
            del self._names[node.number]

    def lookup(self, keys: KeyArray, asking: str) -> list[Holding]:
        """Which other nodes hold which of a prompt's chunks, longest leading run first."""
        holders = self.table.lookup(keys)
        own = self._nodes.get(asking)
        found = []
        for number in np.unique(holders).tolist():
            if number != NOBODY and (own is None or number != own.number):
                held = (holders == number).any(axis=1)
                run = len(held) if held.all() else int(held.argmin())
                positions = np.flatnonzero(held).tolist()
                found.append(Holding(node_id=self._names[number], run=run, positions=positions))
        found.sort(key=lambda holding: (-holding.run, -len(holding.positions), holding.node_id))
        return found

    def clear(self) -> None:
        """Forget all chunks, and ask every shard for what it still has."""
        self.table.clear()
        for node in self._nodes.values():
            node.synced = False

    def peers(self, asking: str) -> int:
        """Other nodes that hold at least one chunk."""
        return sum(
            self.table.count(node.number) > 0
            for name, node in self._nodes.items()
            if name != asking
        )

    def nodes(self, now: float) -> list[NodeStatus]:
        """All nodes, for status pages and for finding silent ones."""
        return [
            NodeStatus(
                node_id=name,
                chunks=self.table.count(node.number),
                synced=node.synced,
                age=now - node.heard,
            )
            for name, node in sorted(self._nodes.items())
        ]

    def _new_node(self, node_id: str) -> _Node:
        number = next(n for n in range(NOBODY) if n not in self._names)
        self._names[number] = node_id
        node = self._nodes[node_id] = _Node(number)
        return node
