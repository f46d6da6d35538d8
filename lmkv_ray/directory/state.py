"""What one part of the directory knows, as a state machine without I/O."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmkv_ray.directory.clears import ClearLog
from lmkv_ray.directory.devices import ClusterDevices
from lmkv_ray.directory.holdings import GPU, Holding, Location
from lmkv_ray.directory.named import NamedTable
from lmkv_ray.directory.table import NO_NODE
from lmkv_ray.keys import KEY_BYTES, KeyArray, key_array
from lmkv_ray.kin import kinds
from lmkv_ray.messages import Clear, Delta, DeltaReply, Kin, Message
from lmkv_ray.story import new_story

SILENT_SECONDS = 5.0
"""No reader is sent to a node whose shard was silent for so long. Shards speak once a second."""
DEVICES_SHARE = 4
"""Engines hold less than nodes: a quarter as many of their chunks are remembered."""


class NodeStatus(Message, frozen=True):
    """What the directory knows about a node."""

    node_id: str
    chunks: int
    synced: bool
    """False while the directory waits for the node's whole content."""
    age: float
    """Seconds since the node's shard was last heard."""
    room: int
    """Bytes of other nodes' chunks that it would take."""
    draining: bool
    idle: float
    """Seconds since an engine was last seen attached."""


class _Sync(enum.Enum):
    """Whether a node's content is known."""

    WANTED = enum.auto()
    COMING = enum.auto()
    DONE = enum.auto()


@dataclass(slots=True)
class _Node:
    number: int
    previous_number: int = NO_NODE
    """While a snapshot is received: the number under which the previous content is still served, as
    hints that are not confirmed yet."""
    epoch: int = -1
    seq: int = 0
    sync: _Sync = _Sync.WANTED
    heard: float = -math.inf
    cleared: int = 0
    room: int = 0
    draining: bool = False
    kin: tuple[Kin, ...] = ()
    """Engines that are attached there."""
    used: float | None = None


class DirectoryState:
    """Chunk -> nodes, fed by the shards' deltas.

    A shard's deltas count only as long as none is missing: after a gap, or from a new life of the
    shard, the directory keeps what it knew (hints, which may be stale) and asks for a
    snapshot until one comes. A snapshot comes in pieces and fills a new number of the node; with
    the last piece the old number is retired, and with it what the node does not hold any more.

    Args:
        capacity: chunks it remembers at most.
        orders_clears: whether it is the part that clears are asked of.
        step: see ``ClearLog``.
    """

    def __init__(
        self, capacity: int, *, orders_clears: bool = True, step: Callable[[], int] = lambda: 1
    ) -> None:
        self._holders: NamedTable[str] = NamedTable(capacity)
        self.table = self._holders.table
        self.devices = ClusterDevices(-(-capacity // DEVICES_SHARE))
        self.nbytes = self.table.nbytes + self.devices.nbytes
        """Bytes of both tables."""
        self.clears = ClearLog(step)
        self._orders_clears = orders_clears
        self._nodes: dict[str, _Node] = {}
        self._numbers = np.empty(0, np.uint16)  # of all nodes, for counting those that hold chunks
        self.story = new_story()
        """The last events, oldest first."""

    def delta(self, delta: Delta, now: float) -> DeltaReply:
        """A shard's news. Any delta may be lost, repeated, late or lying.

        Raises:
            ValueError: the keys are not whole.
        """
        keys = [delta.added, delta.removed]
        keys += [named for device in delta.devices for named in (device.added, device.removed)]
        if any(len(named) % KEY_BYTES for named in keys):
            raise ValueError("keys of a delta are 16 bytes each")
        self.table.sweep()
        node = self._nodes.get(delta.node_id) or self._new_node(delta.node_id)
        node.heard = now
        self.story.append(
            (
                "delta",
                now,
                delta.node_id,
                delta.epoch,
                delta.seq,
                len(delta.added),
                len(delta.removed),
            )
        )
        same_life = delta.epoch == node.epoch
        if not (same_life and delta.seq <= node.seq):  # else what it said is known already
            self.clears.heard(delta.cleared)
            node.cleared, node.room, node.draining = delta.cleared, delta.room, delta.draining
            node.kin = tuple(delta.kin)
            if delta.engines or node.used is None:
                node.used = now
            follows = same_life and node.sync is not _Sync.WANTED and delta.seq == node.seq + 1
            if delta.begin:
                self._begin(node, delta.node_id)
            if delta.begin or follows:
                self._apply(node, delta)
            else:
                node.sync = _Sync.WANTED
        return DeltaReply(
            resync=node.sync is _Sync.WANTED,
            peers=self.peers(delta.node_id),
            clears=self.owed(delta.node_id) if self._orders_clears else [],
            kin=self._kin_of(delta),
        )

    def _kin_of(self, delta: Delta) -> list[Kin]:
        models = {kin.model for kin in delta.kin}
        others = [node for node_id, node in self._nodes.items() if node_id != delta.node_id]
        return kinds(kin for node in others for kin in node.kin if kin.model in models)

    def owed(self, node_id: str) -> list[Clear]:
        """Clears that a node has not said it has carried out, in order."""
        node = self._nodes.get(node_id)
        return self.clears.owed(node.cleared if node is not None else 0)

    def node_lost(self, node_id: str) -> None:
        """A node died: no chunk can be fetched from it."""
        node = self._nodes.pop(node_id, None)
        if node is not None:
            self._holders.retire(node.number)
            self._holders.retire(node.previous_number)
            self.devices.node_lost(node_id)
            self._renumbered()
            self.story.append(("node_lost", None, node_id))

    def lookup(self, keys: KeyArray, asking: str, cleared: int, now: float) -> list[Holding]:
        """Which other nodes hold which of a prompt's chunks, longest leading run first.

        Nodes that were not heard lately, or have missed a clear that some node has carried out,
        hold nothing.

        Args:
            keys: 16 bytes each, naming the chunks.
            asking: node that is not meant.
            cleared: the last clear that it has carried out.
            now: monotonic seconds.
        """
        self.clears.heard(cleared)
        found: dict[Location, list[int]] = {}
        for name, positions in self._holders.lookup(keys):
            if name != asking and self._is_usable(self._nodes[name], now):
                found.setdefault(Location(name), []).extend(positions)
        return Holding.ranked(found)

    def where(self, keys: KeyArray, now: float) -> list[Holding]:
        """The same of all nodes, and of the engines that have chunks on their devices.

        For a router of requests: chunks on a device cannot be fetched.
        """
        on_devices = {
            Location(engine.node_id, GPU, engine.engine_id): positions
            for engine, positions in self.devices.lookup(keys)
            if self._is_usable(self._nodes[engine.node_id], now)
        }
        return Holding.ranked(on_devices) + self.lookup(keys, "", 0, now)

    def peers(self, asking: str) -> int:
        """Other nodes that hold at least one chunk."""
        own = self._nodes.get(asking)
        holding = int(np.count_nonzero(self.table.counts(self._numbers)))
        return holding - (own is not None and self.table.count(own.number) > 0)

    def rooms(self, asking: str, now: float) -> dict[str, int]:
        """Bytes of other nodes' chunks that each node but the asking one would take."""
        return {
            name: node.room
            for name, node in self._nodes.items()
            if name != asking and not node.draining and self._is_usable(node, now)
        }

    def nodes(self, now: float) -> list[NodeStatus]:
        """All nodes, for status pages and for finding silent ones."""
        return [
            NodeStatus(
                node_id=name,
                chunks=self.table.count(node.number) + self.table.count(node.previous_number),
                synced=node.sync is _Sync.DONE,
                age=now - node.heard,
                room=node.room,
                draining=node.draining,
                idle=0.0 if node.used is None else now - node.used,
            )
            for name, node in sorted(self._nodes.items())
        ]

    def validate(self) -> None:
        """Compare nodes, numbers and tables with each other, for tests and simulations.

        Raises:
            AssertionError: something does not hold; the text says what.
        """
        self._holders.validate()
        self.devices.validate(self._nodes)
        names = {node.number: name for name, node in self._nodes.items()}
        previous = {node.previous_number: name for name, node in self._nodes.items()}
        previous.pop(NO_NODE, None)
        assert not names.keys() & previous.keys(), "a number is in use and replaced"
        assert self._holders.names() == names | previous, "numbers of nodes that are not known"
        assert sorted(names) == sorted(self._numbers.tolist()), "counted numbers are not the nodes'"
        for name, node in self._nodes.items():
            coming = node.sync is not _Sync.DONE
            assert coming or node.previous_number == NO_NODE, f"{name}: a snapshot that never ends"

    def _is_usable(self, node: _Node, now: float) -> bool:
        return node.cleared >= self.clears.highest and now - node.heard <= SILENT_SECONDS

    def _begin(self, node: _Node, name: str) -> None:
        """A snapshot comes: what was known before it is not confirmed any more."""
        self._holders.retire(node.previous_number)
        node.previous_number, node.number = node.number, self._holders.new_number(name)
        self.devices.node_lost(name)
        node.sync = _Sync.COMING
        self._renumbered()

    def _apply(self, node: _Node, delta: Delta) -> None:
        if delta.removed:
            removed = key_array(delta.removed)
            self.table.remove(removed, node.number)
            if node.previous_number != NO_NODE:
                self.table.remove(removed, node.previous_number)
        if delta.added:
            self.table.add(key_array(delta.added), node.number, instead_of=node.previous_number)
        if delta.devices:
            self.devices.apply(delta.node_id, delta.devices)
        node.epoch, node.seq = delta.epoch, delta.seq
        if delta.end and node.sync is _Sync.COMING:
            self._holders.retire(node.previous_number)
            node.previous_number, node.sync = NO_NODE, _Sync.DONE

    def _new_node(self, node_id: str) -> _Node:
        node = self._nodes[node_id] = _Node(self._holders.new_number(node_id))
        self._renumbered()
        return node

    def _renumbered(self) -> None:
        self._numbers = np.array([node.number for node in self._nodes.values()], np.uint16)
