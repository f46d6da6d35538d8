"""The directory against shards whose deltas are lost, repeated and reordered."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmkv_ray.directory import DirectoryState
from lmkv_ray.keys import key_array
from lmkv_ray.messages import Delta
from lmkv_ray.shard import DeltaLog

KEYS = [bytes([i]) * 16 for i in range(1, 25)]
ALL = key_array(KEYS)
NODES = ["a", "b", "c"]
nodes = st.sampled_from(NODES)


class Shard:
    """The content of one node, and the log of its changes."""

    def __init__(self, name: str, epoch: int) -> None:
        self.name, self.content = name, dict[bytes, None]()
        self.log = DeltaLog(name, epoch, limit=10)

    def delta(self) -> Delta:
        return self.log.take(self.content)


class DirectoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.epochs = iter(range(1, 1 << 30))
        self.shards = {name: Shard(name, next(self.epochs)) for name in NODES}
        self.directory = DirectoryState(64)
        self.on_the_way: list[Delta] = []
        self.gone: set[str] = set()

    @rule(name=nodes, which=st.lists(st.sampled_from(KEYS), max_size=14), add=st.booleans())
    def change(self, name: str, which: list[bytes], add: bool) -> None:
        shard = self.shards[name]
        for key in which:
            if add:
                shard.content[key] = None
                shard.log.added([key])
            else:
                shard.content.pop(key, None)
                shard.log.removed([key])

    @rule(name=nodes)
    def send(self, name: str) -> None:
        self.on_the_way.append(self.shards[name].delta())

    @rule(i=st.integers(0, 99), copies=st.integers(0, 2))
    def arrive(self, i: int, copies: int) -> None:
        """Any message, in any order; twice (and again later) or never."""
        if not self.on_the_way:
            return
        delta = self.on_the_way.pop(i % len(self.on_the_way))
        for _ in range(copies):
            reply = self.directory.delta(delta, 0)
            if reply.resync:
                self.shards[delta.node_id].log.resync()
        if copies == 2:
            self.on_the_way.append(delta)

    @rule(name=nodes)
    def shard_restarts_empty(self, name: str) -> None:
        self.shards[name] = Shard(name, next(self.epochs))

    @rule(name=nodes)
    def node_lost(self, name: str) -> None:
        self.directory.node_lost(name)
        assert all(h.node_id != name for h in self.directory.lookup(ALL, "x"))

    @rule()
    def directory_restarts(self) -> None:
        self.directory = DirectoryState(64)

    @rule()
    def cleared(self) -> None:
        self.directory.clear()
        assert self.directory.lookup(ALL, "x") == []

    @rule()
    def quiet(self) -> None:
        """Once messages arrive again, two exchanges a shard are enough."""
        for shard in self.shards.values():
            if self.directory.delta(shard.delta(), 0).resync:
                shard.log.resync()
                assert not self.directory.delta(shard.delta(), 0).resync
        for asking in (*NODES, "x"):
            self.check_lookup(asking)

    def check_lookup(self, asking: str) -> None:
        holdings = self.directory.lookup(ALL, asking)
        truth = {
            name: [i for i, key in enumerate(KEYS) if key in shard.content]
            for name, shard in self.shards.items()
            if name != asking
        }
        assert {h.node_id: h.positions for h in holdings} == {n: p for n, p in truth.items() if p}
        for holding in holdings:
            assert holding.positions[: holding.run] == list(range(holding.run))
            assert holding.run not in holding.positions
        assert [h.run for h in holdings] == sorted((h.run for h in holdings), reverse=True)
        assert self.directory.peers(asking) == len(holdings)

    @invariant()
    def bounded(self) -> None:
        assert len(self.directory.table) <= 64
        assert all(len(shard.log._pending) <= 10 for shard in self.shards.values())


TestDirectoryMachine = DirectoryMachine.TestCase
TestDirectoryMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def delta(seq: int, added: bytes = b"", epoch: int = 1, snapshot: bool = False) -> Delta:
    return Delta(node_id="a", epoch=epoch, seq=seq, added=added, removed=b"", snapshot=snapshot)


def test_an_unknown_shard_is_asked_for_everything() -> None:
    directory = DirectoryState(64)
    assert directory.delta(delta(5, KEYS[0]), 0).resync
    assert not directory.delta(delta(6, KEYS[0], snapshot=True), 0).resync
    assert directory.peers("b") == 1
    assert directory.peers("a") == 0


def test_a_gap_keeps_what_was_known_until_the_snapshot() -> None:
    directory = DirectoryState(64)
    directory.delta(delta(1, KEYS[0], snapshot=True), 0)
    assert directory.delta(delta(3, KEYS[1]), 0).resync
    assert directory.lookup(ALL, "b")[0].positions == [0]
    assert directory.delta(delta(4), 0).resync


def test_half_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        DirectoryState(64).delta(delta(1, b"half"), 0)


def test_status() -> None:
    directory = DirectoryState(64)
    directory.delta(delta(1, b"".join(KEYS), snapshot=True), now=5)
    (node,) = directory.nodes(now=7)
    assert (node.node_id, node.chunks, node.synced, node.age) == ("a", 24, True, 2)
    assert math.isfinite(node.age)
