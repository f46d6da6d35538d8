"""The life of a shard's chunks, as a state machine without I/O.

Events go in with the time they happen (``time.monotonic()`` seconds); instructions for the arena
come out, to be applied in order before the event is answered.

Every slot is in exactly one of these states: free; reserved (leased to one holder); quarantined
(its holder died a moment ago, a copy may still be under way); ready (holds one chunk).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lmkv_ray.errors import UnsupportedError
from lmkv_ray.keys import KEY_BYTES
from lmkv_ray.messages import (
    Commit,
    Delta,
    Exchange,
    ExchangeReply,
    Grant,
    Hello,
    MissReason,
    Owner,
)
from lmkv_ray.shard.allocator import Allocator, Assigned, Evicted
from lmkv_ray.shard.deltas import DeltaLog
from lmkv_ray.shard.instructions import (
    AssignExtent,
    Free,
    Instruction,
    Publish,
    Reserve,
    Retire,
)
from lmkv_ray.shard.values import Counters, Limits, RecoveredSlot


@dataclass(slots=True)
class _Chunk:
    space: int
    nbytes: int


@dataclass(slots=True)
class _Holder:
    """Who may fill slots: an engine, or the shard itself for one space."""

    owner: Owner
    space: int
    slot_bytes: int
    model: str = ""
    leases: dict[int, float] = field(default_factory=dict)
    """Slot -> deadline."""


class ShardState:
    """Everything a shard knows, except the bytes.

    Args:
        allocator: a new one.
        owner: the shard's own process, which reserves slots for staging.
        deltas: collects changes for the directory.
        limits: bounds.
    """

    def __init__(
        self, allocator: Allocator, owner: Owner, deltas: DeltaLog, limits: Limits | None = None
    ) -> None:
        self.owner = owner
        self.deltas = deltas
        self.limits = limits or Limits()
        self.counters = Counters()
        self.nbytes = 0
        """Bytes of all ready chunks."""
        self._allocator = allocator
        self._chunks: dict[bytes, _Chunk] = {}
        # Engines by their id, and the shard itself by space and slot size.
        self._holders: dict[str | tuple[int, int], _Holder] = {}
        self._orphans: dict[int, Owner] = {}
        self._quarantine: deque[tuple[float, tuple[int, ...]]] = deque()

    # -- engines ---------------------------------------------------------------------------------

    def hello(self, hello: Hello, now: float) -> tuple[Grant, list[Instruction]]:
        """An engine attaches, or does so again.

        ``held`` is the whole truth about what the engine holds: slots of a grant whose message was
        lost are free again, and those the predecessor granted and ``held`` names are its own.

        Raises:
            UnsupportedError: chunks of this size do not fit the arena.
        """
        if not self._allocator.fits(hello.slot_bytes):
            raise UnsupportedError(
                f"A chunk of {hello.slot_bytes} bytes does not fit the arena, whose slots have "
                f"{self._allocator.min_slot_bytes} to {self._allocator.extent_bytes} bytes.",
                next_step="set chunk_tokens or capacity so that a chunk fits.",
            )
        out: list[Instruction] = []
        before = self._holders.pop(hello.engine_id, None)
        holder = _Holder(hello.owner, hello.space, hello.slot_bytes, hello.model)
        self._holders[hello.engine_id] = holder
        leases: dict[int, float] = {}
        if before is not None:
            if before.owner == hello.owner:
                leases = before.leases
            else:
                self._rest(before.leases, now)
        deadline = now + self.limits.grant_seconds
        # A changed space means that what is in the slots has another meaning: start afresh.
        same = before is None or before.space == hello.space
        for slot in dict.fromkeys(hello.held):
            mine = leases.pop(slot, None) is not None
            if not mine and self._orphans.get(slot) == hello.owner:
                del self._orphans[slot]
                mine = True
            if mine and same and self._allocator.slot_bytes(slot) == hello.slot_bytes:
                holder.leases[slot] = deadline
            elif mine:
                leases[slot] = deadline
        self._free(leases, out)
        return Grant(slots=list(holder.leases), deadline=deadline), out

    def exchange(self, exchange: Exchange, now: float) -> tuple[ExchangeReply, list[Instruction]]:
        """An engine's batch: commits, then releases, then touches, then a new grant."""
        holder = self._holders.get(exchange.engine_id)
        if holder is None:
            return ExchangeReply(known=False), []
        out: list[Instruction] = []
        refused = self._commit(holder, exchange.commits, now, out)
        returned = [slot for slot in dict.fromkeys(exchange.released) if slot in holder.leases]
        for slot in returned:
            del holder.leases[slot]
        self._free(returned, out)
        self.touch(exchange.touched)
        grant = None
        if exchange.want > 0:
            deadline = now + self.limits.grant_seconds
            slots = self._lease(holder, exchange.want, deadline, out)
            grant = Grant(slots=list(slots), deadline=deadline) if slots else None
        return ExchangeReply(grant=grant, refused=refused), out

    def owners(self) -> set[Owner]:
        """The processes whose death must be noticed (never the shard's own)."""
        owners = {holder.owner for holder in self._holders.values()} | set(self._orphans.values())
        return owners - {self.owner}

    def owner_gone(self, owner: Owner, now: float) -> None:
        """A process died; what it was writing is quarantined, then free (see ``tick``)."""
        gone = [name for name, holder in self._holders.items() if holder.owner == owner]
        for name in gone:
            self._rest(self._holders.pop(name).leases, now)
        orphans = [slot for slot, its in self._orphans.items() if its == owner]
        for slot in orphans:
            del self._orphans[slot]
        self._rest(orphans, now)

    def tick(self, now: float) -> list[Instruction]:
        """Time passes: slots whose quarantine is over become free."""
        out: list[Instruction] = []
        while self._quarantine and self._quarantine[0][0] <= now:
            self._free(self._quarantine.popleft()[1], out)
        return out

    def extent_failed(self, extent: int) -> frozenset[int]:
        """The memory of an extent that was just assigned could not be had.

        Returns:
            slots of it that were leased by the same event; nobody must be told of them.
        """
        lost = set()
        for holder in self._holders.values():
            mine = [slot for slot in holder.leases if slot // self._allocator.stride == extent]
            for slot in mine:
                del holder.leases[slot]
            lost.update(mine)
        self._allocator.lose(extent)
        return frozenset(lost)

    # -- staging: the shard fills slots itself ---------------------------------------------------

    def engine(self, engine_id: str) -> tuple[int, int] | None:
        """(space, slot_bytes) of an attached engine."""
        holder = self._holders.get(engine_id)
        return (holder.space, holder.slot_bytes) if holder else None

    def reserve(self, space: int, slot_bytes: int, n: int) -> tuple[list[int], list[Instruction]]:
        """Up to ``n`` slots for the shard itself; they do not expire, but ``clear`` spoils them."""
        out: list[Instruction] = []
        slots = self._lease(self._own(space, slot_bytes), n, float("inf"), out)
        return list(slots), out

    def commit(
        self, space: int, slot_bytes: int, commits: Sequence[Commit], now: float
    ) -> tuple[list[int], list[Instruction]]:
        """Publish what the shard staged; returns refused slots (cleared meanwhile), now free."""
        out: list[Instruction] = []
        return self._commit(self._own(space, slot_bytes), commits, now, out), out

    def release(self, space: int, slot_bytes: int, slots: Iterable[int]) -> list[Instruction]:
        """The shard will not fill these after all, and nobody writes into them any more."""
        out: list[Instruction] = []
        holder = self._own(space, slot_bytes)
        returned = [slot for slot in dict.fromkeys(slots) if slot in holder.leases]
        for slot in returned:
            del holder.leases[slot]
        self._free(returned, out)
        return out

    # -- chunks ----------------------------------------------------------------------------------

    def __contains__(self, key: bytes) -> bool:
        return key in self._chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def slot(self, key: bytes) -> int | None:
        """Where a ready chunk is."""
        return self._allocator.slot_of.get(key)

    def touch(self, keys: bytes) -> None:
        """Chunks were hit, deepest of a prompt first; 16 bytes each."""
        whole = len(keys) - len(keys) % KEY_BYTES
        self._allocator.touch([keys[i : i + KEY_BYTES] for i in range(0, whole, KEY_BYTES)])

    def clear(self, space: int | None = None) -> list[Instruction]:
        """Remove all chunks (of one space), and refuse those that are being filled right now."""
        keys = [key for key, its in self._chunks.items() if space in (None, its.space)]
        out: list[Instruction] = []
        if keys:
            self._retire(self._allocator.evict(keys), MissReason.CLEARED, out)
        for holder in self._holders.values():
            if space in (None, holder.space):
                # They began before the clear; published after it they would come back.
                holder.leases = dict.fromkeys(holder.leases, float("-inf"))
        return out

    def limit(self, slot_bytes: int) -> int:
        """Slots of this size that one holder may have."""
        quarter = self._allocator.capacity(slot_bytes) // 4
        return min(self.limits.holder_slots, max(1, quarter))

    def delta(self) -> Delta:
        """What to tell the directory now (an empty delta is a heartbeat)."""
        return self.deltas.take(self._chunks)

    def engines(self) -> dict[str, tuple[str, int]]:
        """Attached engines: (model, reserved slots) by engine_id."""
        return {
            name: (holder.model, len(holder.leases))
            for name, holder in self._holders.items()
            if isinstance(name, str)
        }

    # -- recovery --------------------------------------------------------------------------------

    def recover(
        self,
        extents: Sequence[int],
        rows: Iterable[RecoveredSlot],
        alive: Callable[[Owner], bool],
        now: float,
    ) -> list[Instruction]:
        """Take over what a predecessor left in the arena. Call once, before any other event.

        Args:
            extents: the slot size of each extent; 0 for unassigned ones.
            rows: all slots that are not free, least recently used chunk first.
            alive: whether a process still lives. Slots reserved by living owners are kept aside
                until the engine says ``hello`` or dies; others are quarantined.
            now: monotonic seconds.
        """
        rows = list(rows)
        by_extent: dict[int, list[int]] = {}
        for row in rows:
            by_extent.setdefault(row.slot // self._allocator.stride, []).append(row.slot)
        for extent, slots in by_extent.items():
            self._allocator.adopt(extent, extents[extent], slots)
        rows_of = Counter(row.key for row in rows)
        out: list[Instruction] = []
        for row in rows:
            if row.key is not None and rows_of[row.key] == 1:
                self._fill(row.slot, row.key, _Chunk(row.space, row.nbytes))
            elif row.key is not None:  # never written so: trust neither
                self._allocator.free(row.slot)
                out.append(Retire((row.slot,), MissReason.EVICTED))
            elif row.owner is not None and alive(row.owner):
                self._orphans[row.slot] = row.owner
            else:
                self._rest([row.slot], now)
        self.deltas.resync()
        return out

    # -- steps shared by the events --------------------------------------------------------------

    def _own(self, space: int, slot_bytes: int) -> _Holder:
        own = _Holder(self.owner, space, slot_bytes)
        return self._holders.setdefault((space, slot_bytes), own)

    def _lease(
        self, holder: _Holder, want: int, deadline: float, out: list[Instruction]
    ) -> tuple[int, ...]:
        """Up to ``want`` more slots, within the holder's share and half of the arena for all."""
        capacity = self._allocator.capacity(holder.slot_bytes)
        n = min(
            want,
            self.limit(holder.slot_bytes) - len(holder.leases),
            max(1, capacity // 2) - self._allocator.pinned(holder.slot_bytes),
        )
        taken = self._allocator.take(holder.slot_bytes, n)
        for step in taken.steps:
            if isinstance(step, Assigned):
                out.append(AssignExtent(step.extent, step.slot_bytes))
            else:
                self._retire(step, MissReason.EVICTED, out)
        if taken.slots:
            out.append(Reserve(taken.slots, holder.owner))
            holder.leases.update(dict.fromkeys(taken.slots, deadline))
        self.counters.granted += len(taken.slots)
        self.counters.ungranted += want - len(taken.slots)
        return taken.slots

    def _commit(
        self, holder: _Holder, commits: Sequence[Commit], now: float, out: list[Instruction]
    ) -> list[int]:
        refused: list[int] = []
        back: list[int] = []
        accepted: dict[bytes, Commit] = {}
        for commit in commits:
            deadline = holder.leases.pop(commit.slot, None)
            sound = len(commit.key) == KEY_BYTES and 0 <= commit.nbytes <= holder.slot_bytes
            if deadline is None:
                refused.append(commit.slot)  # not the holder's: leave the slot alone
            elif now > deadline or not sound:
                refused.append(commit.slot)
                back.append(commit.slot)
            elif commit.key in self._chunks or commit.key in accepted:
                self.counters.duplicate += 1
                back.append(commit.slot)
            else:
                accepted[commit.key] = commit
        # Head last, so that of one batch of a prompt the tail is evicted first.
        for key, commit in reversed(accepted.items()):
            self._fill(commit.slot, key, _Chunk(holder.space, commit.nbytes))
        if accepted:
            out.append(
                Publish(
                    slots=tuple(commit.slot for commit in accepted.values()),
                    keys=tuple(accepted),
                    nbytes=tuple(commit.nbytes for commit in accepted.values()),
                    space=holder.space,
                )
            )
            self.deltas.added(accepted)
        self._free(back, out)
        self.counters.committed += len(accepted)
        self.counters.refused += len(refused)
        return refused

    def _fill(self, slot: int, key: bytes, chunk: _Chunk) -> None:
        self._allocator.fill(slot, key)
        self._chunks[key] = chunk
        self.nbytes += chunk.nbytes

    def _retire(self, evicted: Evicted, reason: MissReason, out: list[Instruction]) -> None:
        if not evicted.slots:
            return
        for key in evicted.keys:
            self.nbytes -= self._chunks.pop(key).nbytes
        if reason is MissReason.CLEARED:
            self.counters.cleared += len(evicted.slots)
        else:
            self.counters.evicted += len(evicted.slots)
        self.deltas.removed(evicted.keys)
        out.append(Retire(evicted.slots, reason))

    def _free(self, slots: Iterable[int], out: list[Instruction]) -> None:
        freed = tuple(slots)
        for slot in freed:
            self._allocator.free(slot)
        if freed:
            out.append(Free(freed))

    def _rest(self, slots: Iterable[int], now: float) -> None:
        resting = tuple(slots)
        if resting:
            self._quarantine.append((now + self.limits.grace_seconds, resting))
