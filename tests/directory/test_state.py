"""The directory against shards whose deltas are lost, repeated and reordered."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmkv_ray.directory import GPU, DirectoryState, Holding, Location, merge
from lmkv_ray.directory.state import SILENT_SECONDS
from lmkv_ray.keys import key_array, parts_of
from lmkv_ray.messages import Clear, Delta, DeltaReply, Kin
from lmkv_ray.shard import DeltaLog

KEYS = [bytes([i]) * 16 for i in range(1, 25)]
ALL = key_array(KEYS)
NODES = ["a", "b", "c"]
PARTS = 2
nodes = st.sampled_from(NODES)
engines = st.sampled_from(["e", "f"])


class Shard:
    """The content of one node, and the log of its changes."""

    def __init__(self, name: str, epoch: int) -> None:
        self.name = name
        self.content: dict[bytes, int] = {}  # key -> newest clear when it was saved
        self.devices: dict[str, set[bytes]] = {}
        self.cleared = 0
        self.start(epoch)

    def start(self, epoch: int) -> None:
        self.log = DeltaLog(self.name, epoch, parts=PARTS, limit=10, piece=3)

    def delta(self, part: int) -> Delta:
        delta = self.log.take(self.content, part, self.devices)
        return msgspec.structs.replace(delta, cleared=self.cleared)

    def clear(self, clear: Clear) -> None:
        if clear.number > self.cleared:
            self.log.removed(list(self.content))
            self.content.clear()
            for engine in [*self.devices]:
                self.engine_dies(engine)
            self.cleared = clear.number

    def engine_dies(self, engine: str) -> None:
        self.log.removed(list(self.devices.pop(engine, ())), engine)

    def hear(self, part: int, reply: DeltaReply) -> None:
        for clear in reply.clears:
            self.clear(clear)
        if reply.resync:
            self.log.resync(part)


class DirectoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.epochs = iter(range(1, 1 << 30))
        self.shards = {name: Shard(name, next(self.epochs)) for name in NODES}
        self.on_the_way: list[tuple[int, Delta]] = []
        self.newest_clear = 0
        self.directory_restarts()

    @rule(name=nodes, which=st.lists(st.sampled_from(KEYS), max_size=14), add=st.booleans())
    def change(self, name: str, which: list[bytes], add: bool) -> None:
        shard = self.shards[name]
        for key in which:
            if add:
                shard.content[key] = self.newest_clear
                shard.log.added([key])
            else:
                shard.content.pop(key, None)
                shard.log.removed([key])

    @rule(name=nodes, engine=engines, which=st.sets(st.sampled_from(KEYS)), add=st.booleans())
    def device_changes(self, name: str, engine: str, which: set[bytes], add: bool) -> None:
        shard = self.shards[name]
        held = shard.devices.setdefault(engine, set())
        if add:
            shard.log.added(sorted(which), engine)
            held |= which
        else:
            shard.log.removed(sorted(which), engine)
            held -= which

    @rule(name=nodes, engine=engines)
    def engine_dies(self, name: str, engine: str) -> None:
        self.shards[name].engine_dies(engine)

    @rule(name=nodes, part=st.integers(0, PARTS - 1))
    def send(self, name: str, part: int) -> None:
        self.on_the_way.append((part, self.shards[name].delta(part)))

    @rule(i=st.integers(0, 99), copies=st.integers(0, 2), answered=st.booleans())
    def arrive(self, i: int, copies: int, answered: bool) -> None:
        """Any message, in any order; twice (and again later) or never; maybe unanswered."""
        if not self.on_the_way:
            return
        part, delta = self.on_the_way.pop(i % len(self.on_the_way))
        for _ in range(copies):
            reply = self.parts[part].delta(delta, 0)
            if answered:
                self.shards[delta.node_id].hear(part, reply)
        if copies == 2:
            self.on_the_way.append((part, delta))

    @rule(name=nodes)
    def speak(self, name: str) -> None:
        """As it is on most days."""
        for part, state in enumerate(self.parts):
            self.shards[name].hear(part, state.delta(self.shards[name].delta(part), 0))

    @rule(name=nodes, which=st.sets(st.sampled_from(KEYS), min_size=1))
    def save_and_speak(self, name: str, which: set[bytes]) -> None:
        self.change(name, sorted(which), add=True)
        self.speak(name)
        self.speak(name)

    @rule(name=nodes)
    def shard_restarts_empty(self, name: str) -> None:
        self.shards[name] = Shard(name, next(self.epochs))

    @rule(name=nodes)
    def shard_restarts_and_adopts_its_arena(self, name: str) -> None:
        self.shards[name].start(next(self.epochs))

    @rule(name=nodes)
    def node_lost(self, name: str) -> None:
        for part in self.parts:
            part.node_lost(name)
        assert all(h.node_id != name for h in self.lookup("x"))

    @rule()
    def directory_restarts(self) -> None:
        self.parts = [DirectoryState(64, orders_clears=not part) for part in range(PARTS)]

    @rule(reached=st.sets(nodes))
    def clear(self, reached: set[str]) -> None:
        """As the actor does it: pushed to all, and again if somebody knows a later number."""
        if not reached:
            return  # the user is told that it failed
        while True:
            clear = self.parts[0].clears.new(b"", 0)
            later = [self.shards[name].cleared for name in reached]
            for number in later:
                self.parts[0].clears.heard(number)
            for name in reached:
                self.shards[name].clear(clear)
            if max(later) <= clear.number:
                break
        self.newest_clear = clear.number

    @rule()
    def quiet(self) -> None:
        """Once messages arrive again, all is known exactly."""
        for _ in range(3):  # who is behind another one hears it when that one has spoken
            for shard in self.shards.values():
                for part, state in enumerate(self.parts):
                    for _ in range(20):
                        shard.hear(part, state.delta(shard.delta(part), 0))
                        if not shard.log.pending(part):
                            break
                    else:
                        raise AssertionError("a snapshot does not end")
        for asking in (*NODES, "x"):
            self.check_lookup(asking)
        self.check_where()

    def lookup(self, asking: str) -> list[Holding]:
        cleared = self.shards[asking].cleared if asking in self.shards else 0
        answers = []
        for part, state in enumerate(self.parts):
            asked = np.flatnonzero(parts_of(ALL, PARTS) == part)
            answers.append((asked.tolist(), state.lookup(ALL[asked], asking, cleared, now=0)))
        return merge(answers)

    @invariant()
    def nobody_is_sent_to_what_was_cleared(self) -> None:
        for asking in NODES:
            for holding in self.lookup(asking):
                content = self.shards[holding.node_id].content
                for position in holding.positions:
                    saved = content.get(KEYS[position])
                    assert saved is None or saved >= self.shards[asking].cleared

    def check_lookup(self, asking: str) -> None:
        holdings = self.lookup(asking)
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
        assert (max(part.peers(asking) for part in self.parts) > 0) == bool(holdings)

    def check_where(self) -> None:
        answers = []
        for part, state in enumerate(self.parts):
            asked = np.flatnonzero(parts_of(ALL, PARTS) == part)
            answers.append((asked.tolist(), state.where(ALL[asked], now=0)))
        truth = {Location(name): set(shard.content) for name, shard in self.shards.items()}
        for name, shard in self.shards.items():
            truth |= {Location(name, GPU, engine): held for engine, held in shard.devices.items()}
        told = {h.location: {KEYS[i] for i in h.positions} for h in merge(answers)}
        assert told == {place: held for place, held in truth.items() if held}

    @invariant()
    def bounded(self) -> None:
        for part in self.parts:
            part.validate()
            assert len(part.table) <= 64
            assert len(part._holders) <= 2 * len(NODES)
            assert len(part.devices) <= 2 * len(NODES)
        for shard in self.shards.values():
            assert all(sum(map(len, state.changes.values())) <= 10 for state in shard.log._parts)


TestDirectoryMachine = DirectoryMachine.TestCase
TestDirectoryMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def delta(seq: int, added: bytes = b"", epoch: int = 1, snapshot: bool = False) -> Delta:
    return Delta(
        node_id="a", epoch=epoch, seq=seq, added=added, removed=b"", begin=snapshot, end=snapshot
    )


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
    assert directory.lookup(ALL, "b", 0, 0)[0].positions == [0]
    assert directory.delta(delta(4), 0).resync


def test_a_snapshot_in_pieces_replaces_what_was_known_with_its_last_piece() -> None:
    directory = DirectoryState(64)
    directory.delta(delta(1, KEYS[0] + KEYS[1], snapshot=True), 0)
    pieces = [
        Delta(node_id="a", epoch=2, seq=1, added=KEYS[1], removed=b"", begin=True),
        Delta(node_id="a", epoch=2, seq=2, added=KEYS[2], removed=b"", end=True),
    ]
    assert not directory.delta(pieces[0], 0).resync
    assert directory.lookup(ALL, "b", 0, 0)[0].positions == [0, 1]
    assert not directory.delta(pieces[1], 0).resync
    assert directory.lookup(ALL, "b", 0, 0)[0].positions == [1, 2]


def test_a_silent_node_holds_nothing_until_it_speaks_again() -> None:
    directory = DirectoryState(64)
    directory.delta(delta(1, KEYS[0], snapshot=True), now=0)
    assert directory.lookup(ALL, "b", 0, SILENT_SECONDS)
    assert not directory.lookup(ALL, "b", 0, SILENT_SECONDS + 1)
    directory.delta(delta(2), now=SILENT_SECONDS + 1)
    assert directory.lookup(ALL, "b", 0, SILENT_SECONDS + 1)


def test_engines_hear_of_those_of_their_model_on_other_nodes() -> None:
    state = DirectoryState(64)

    def tell(node: str, *kin: Kin) -> list[Kin]:
        delta = Shard(node, 1).delta(0)
        return state.delta(msgspec.structs.replace(delta, kin=list(kin)), 0).kin

    one, two = (Kin(model="m", space=space, fields={}) for space in (1, 2))
    assert tell("a", one) == []
    assert tell("b", two) == [one]
    assert tell("c", Kin(model="other", space=3, fields={})) == []
    state.node_lost("a")
    assert tell("b", two) == []


def test_half_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        DirectoryState(64).delta(delta(1, b"half"), 0)


def test_status() -> None:
    directory = DirectoryState(64)
    directory.delta(delta(1, b"".join(KEYS), snapshot=True), now=5)
    (node,) = directory.nodes(now=7)
    assert (node.node_id, node.chunks, node.synced, node.age) == ("a", 24, True, 2)
    assert node.idle == 2
    directory.delta(msgspec.structs.replace(delta(2), engines=1), now=8)
    assert directory.nodes(now=9)[0].idle == 1
    assert math.isfinite(node.age)
