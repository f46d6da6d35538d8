"""Whatever engines, workers and time do, the shard never gives a slot to two, and never stalls."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmkv_ray.directory import DirectoryState
from lmkv_ray.keys import key_array
from lmkv_ray.messages import Commit, Exchange, Hello, Owner
from lmkv_ray.policies import LRU
from lmkv_ray.shard import Allocator, DeltaLog, Limits, ShardState
from lmkv_ray.shard.extents import SlotUse
from tests.shard.fake_arena import EXTENT_BYTES, EXTENTS, MIN_SLOT_BYTES, FakeArena

LIMITS = Limits(grant_seconds=10.0, grace_seconds=3.0, holder_slots=9)
KEYS_PER_SPACE = 16
KEYS = [bytes([i]) * 16 for i in range(4 * KEYS_PER_SPACE)]
CLASSES = [(1, 8), (2, 8), (3, 16), (4, 24)]  # (space, slot_bytes)

which = st.sampled_from([0, 0, 0, 1, 2, 2, 3])
seeds = st.integers(0, 1 << 16)
seldom = st.sampled_from([False, False, False, False, True])


@dataclass
class Engine:
    """What an engine process believes."""

    name: str
    owner: Owner
    space: int
    slot_bytes: int
    held: dict[int, float] = field(default_factory=dict)
    limbo: list[int] = field(default_factory=list)
    """Committed or released in a message without answer: not written any more, told in hello."""
    spoiled: set[int] = field(default_factory=set)
    """Slots it held when its space was cleared: must be refused, whatever happens meanwhile."""
    attached: bool = False


def key_of(space: int, seed: int) -> bytes:
    """Every space has keys of its own."""
    return KEYS[seed % KEYS_PER_SPACE + KEYS_PER_SPACE * space]


class ShardMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.arena = FakeArena()
        self.pids = iter(range(1, 1 << 30))
        self.lives = iter(range(1, 1 << 30))
        self.engines = [self.new_engine(i) for i in range(4)]
        self.dead: list[tuple[float, Engine]] = []  # (since the shard knows, engine)
        self.staging: list[tuple[int, int, list[int]]] = []
        self.directory = DirectoryState(64)
        self.start_shard()
        for i in range(4):
            self.hello(i, lost=False)

    def new_engine(self, i: int) -> Engine:
        space, slot_bytes = CLASSES[i]
        return Engine(f"e{i}", Owner(pid=next(self.pids), start=1), space, slot_bytes)

    def start_shard(self) -> None:
        self.state = ShardState(
            Allocator(EXTENTS, EXTENT_BYTES, MIN_SLOT_BYTES, LRU),
            Owner(pid=next(self.pids), start=1),
            DeltaLog("n", next(self.lives), limit=5),
            limits=LIMITS,
        )

    def exchange(self, engine: Engine, exchange: Exchange) -> list[int]:
        holder = self.state._leases.holders.get(engine.name)
        room = 0
        if holder is not None:
            # Upper bound of what is handed back first: count it after, from the arena.
            probe = Exchange(
                engine_id=engine.name, commits=exchange.commits, released=exchange.released
            )
            reply, out = self.state.exchange(probe, self.now)
            self.arena.apply(out)
            self.refused = reply.refused
            size = engine.slot_bytes
            capacity = EXTENTS * (EXTENT_BYTES // size)
            pins = sum(self.state._extents.slot_bytes(s) == size for s in self.arena.reserved)
            room = min(
                exchange.want,
                self.state.limit(size) - len(holder.leases),
                max(1, capacity * 3 // 8) - pins,
                self.arena.available(size, self.state._extents.draining),
            )
        reply, out = self.state.exchange(
            Exchange(engine_id=engine.name, touched=exchange.touched, want=exchange.want), self.now
        )
        self.arena.apply(out)
        assert reply.known == (holder is not None)
        granted = reply.grant.slots if reply.grant else []
        assert len(granted) >= room, "progress"
        return granted

    @rule(i=which, lost=seldom)
    def says_hello(self, i: int, lost: bool) -> None:
        self.hello(i, lost)

    def hello(self, i: int, lost: bool) -> None:
        engine = self.engines[i]
        message = Hello(
            engine_id=engine.name,
            owner=engine.owner,
            space=engine.space,
            model="m",
            slot_bytes=engine.slot_bytes,
            held=[*engine.held, *engine.limbo],
        )
        grant, out = self.state.hello(message, self.now)
        self.arena.apply(out)
        assert set(grant.slots) <= {*engine.held, *engine.limbo}
        engine.attached = not lost  # who got no answer does not know its new deadlines
        if not lost:
            engine.held = dict.fromkeys(grant.slots, grant.deadline)
            engine.limbo = []

    @rule(i=which, seed=seeds, want=st.sampled_from([0, 1, 4, 9, 12]), lost=seldom)
    def talk(self, i: int, seed: int, want: int, lost: bool) -> None:
        engine = self.engines[i]
        slots = list(engine.held)
        filled, rest = slots[: seed % 8], slots[seed % 8 :]
        commits = []
        for j, slot in enumerate(filled):
            key = key_of(i, seed + j)
            # A late engine may still write: the slot is its own until it hands it back.
            self.arena.content[slot] = key
            commits.append(Commit(slot=slot, key=key, nbytes=engine.slot_bytes - seed % 3))
        released = rest[: seed % 2]
        touched = b"".join(KEYS[(seed * 3 + j) % len(KEYS)] for j in range(seed % 5))
        bad = {s for s in filled if engine.held[s] < self.now or s in engine.spoiled}
        granted = self.exchange(
            engine,
            Exchange(
                engine_id=engine.name,
                commits=commits,
                released=released,
                touched=touched,
                want=want,
            ),
        )
        for slot in (*filled, *released):
            del engine.held[slot]
            engine.spoiled.discard(slot)
        if lost or engine.name not in self.state._leases.holders:
            engine.attached = False
            engine.limbo += [*filled, *released]
            return
        if engine.attached:
            assert bad <= set(self.refused)
        assert not set(granted) & set(engine.held)
        engine.held.update(dict.fromkeys(granted, self.now + LIMITS.grant_seconds))

    @rule(i=which, seed=seeds)
    def write_late(self, i: int, seed: int) -> None:
        """A worker writes into any slot its engine holds, however old the grant is."""
        held = list(self.engines[i].held)
        if held:
            self.arena.content[held[seed % len(held)]] = "half a copy"

    @rule(seed=seeds)
    def write_after_death(self, seed: int) -> None:
        """Workers may outlive their engine for less than the grace period."""
        for since, engine in self.dead:
            if self.now < since + LIMITS.grace_seconds and engine.held:
                slots = list(engine.held)
                self.arena.content[slots[seed % len(slots)]] = "from the grave"

    @rule(i=which)
    def engine_dies(self, i: int) -> None:
        engine = self.engines[i]
        self.state.owner_gone(engine.owner, self.now)
        self.dead.append((self.now, engine))
        self.engines[i] = self.new_engine(i)
        self.hello(i, lost=False)

    @rule(i=which, slot=st.integers(-1, EXTENTS * 8), seed=seeds)
    def liar(self, i: int, slot: int, seed: int) -> None:
        """Commits and releases of slots that are not the engine's change nothing."""
        engine = self.engines[i]
        if slot in self.engines[i].held or not engine.attached:
            return
        holder = self.state._leases.holders.get(engine.name)
        if holder is None or slot in holder.leases:
            return
        reply, out = self.state.exchange(
            Exchange(
                engine_id=engine.name,
                commits=[Commit(slot=slot, key=KEYS[seed % len(KEYS)], nbytes=1)],
                released=[slot],
            ),
            self.now,
        )
        assert reply.refused == [slot]
        assert out == []

    @rule(i=which, n=st.integers(0, 6))
    def stage_begins(self, i: int, n: int) -> None:
        space, slot_bytes = CLASSES[i]
        slots, out = self.state.reserve(space, slot_bytes, n)
        self.arena.apply(out)
        self.staging.append((space, slot_bytes, slots))

    @precondition(lambda self: self.staging)
    @rule(seed=seeds)
    def stage_ends(self, seed: int) -> None:
        space, slot_bytes, slots = self.staging.pop(seed % len(self.staging))
        commits = []
        for j, slot in enumerate(slots[: len(slots) // 2]):
            key = key_of(space - 1, seed + j)
            self.arena.content[slot] = key
            commits.append(Commit(slot=slot, key=key, nbytes=1))
        _, out = self.state.commit(space, slot_bytes, commits, self.now)
        self.arena.apply(out)
        self.arena.apply(self.state.release(space, slot_bytes, slots))

    @rule(space=st.sampled_from([None, 1, 2, 3, 4]))
    def clear(self, space: int | None) -> None:
        self.arena.apply(self.state.clear(space))
        left = self.arena.ready.values()
        assert not [row for row in left if space in (None, row.space)]
        for holder in self.state._leases.holders.values():
            if space in (None, holder.space):
                assert all(deadline < self.now for deadline in holder.leases.values())
        for engine in self.engines:  # they learn it by a refusal
            if space in (None, engine.space):
                engine.spoiled |= set(engine.held)

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.arena.apply(self.state.tick(self.now))

    @rule()
    def shard_restarts(self) -> None:
        self.start_shard()
        alive = {engine.owner for engine in self.engines}
        out = self.state.recover(
            self.arena.sizes, self.arena.rows(), lambda owner: owner in alive, self.now
        )
        self.arena.apply(out)
        self.staging.clear()
        for i in range(4):
            self.hello(i, lost=False)
        self.dead = [  # the successor does not know how long they have been dead
            (self.now, engine)
            for since, engine in self.dead
            if self.now < since + LIMITS.grace_seconds
        ]

    @rule(lost=seldom)
    def tell_directory(self, lost: bool) -> None:
        delta = self.state.delta()
        if not lost and self.directory.delta(delta, self.now).resync:
            self.state.deltas.resync()
            assert not self.directory.delta(self.state.delta(), self.now).resync
        if not lost:
            known = self.directory.table.lookup(key_array(KEYS)) != 0xFFFF
            assert known.any(axis=1).tolist() == [key in self.state.chunks for key in KEYS]

    @invariant()
    def valid(self) -> None:
        self.state.validate()

    @invariant()
    def no_two_hold_a_slot(self) -> None:
        leases = [s for holder in self.state._leases.holders.values() for s in holder.leases]
        resting = [s for _, slots in self.state._leases.resting for s in slots]
        orphans = [s for slots in self.state._leases.orphans.values() for s in slots]
        pinned = [*leases, *resting, *orphans]
        assert len(pinned) == len(set(pinned))
        assert set(pinned) == set(self.arena.reserved)
        for holder in self.state._leases.holders.values():
            assert all(self.arena.reserved[slot] == holder.owner for slot in holder.leases)
            assert len(holder.leases) <= self.state.limit(holder.slot_bytes)

    @invariant()
    def nobody_else_gets_a_slot_that_may_be_written(self) -> None:
        graves = [e for since, e in self.dead if self.now < since + LIMITS.grace_seconds]
        for engine in (*self.engines, *graves):
            assert all(self.arena.reserved.get(slot) == engine.owner for slot in engine.held)

    @invariant()
    def every_slot_is_in_one_state(self) -> None:
        extents = self.state._extents
        use = extents.use.ravel().tolist()
        free = [slot for size in extents.classes.values() for slot in size.free]
        assert len(free) == len(set(free))
        assert set(free) == {s for s, u in enumerate(use) if u == SlotUse.FREE}
        assert set(self.arena.ready) == {s for s, u in enumerate(use) if u == SlotUse.READY}
        assert set(self.arena.reserved) == {s for s, u in enumerate(use) if u == SlotUse.RESERVED}
        assert all(self.arena.exists(slot) for slot in free)

    @invariant()
    def every_ready_key_has_one_slot_with_its_bytes(self) -> None:
        slots = {row.key: slot for slot, row in self.arena.ready.items()}
        assert len(slots) == len(self.arena.ready) == len(self.state.chunks)
        assert slots == self.state._allocator.slot_of
        assert all(self.arena.content[slot] == key for key, slot in slots.items())
        assert self.state.chunks.nbytes == sum(row.nbytes for row in self.arena.ready.values())


TestShardMachine = ShardMachine.TestCase
TestShardMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
