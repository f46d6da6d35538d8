"""The life of a shard's chunks, as a state machine without I/O.

Events go in with the time they happen (``time.monotonic()`` seconds); instructions for the arena
come out, to be applied in order before the event is answered.

Every slot is in exactly one of these states: free; reserved (leased to one holder); quarantined
(its holder died a moment ago, a copy may still be under way); ready (holds one chunk).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from msgspec.structs import replace

from lmkv_ray.errors import UnsupportedError
from lmkv_ray.hints import Hints
from lmkv_ray.keys import KEY_BYTES
from lmkv_ray.kin import differing, kinds
from lmkv_ray.messages import (
    Commit,
    Delta,
    Exchange,
    ExchangeReply,
    Grant,
    Hello,
    Kin,
    MissReason,
    Owner,
)
from lmkv_ray.shard.admission import Admission
from lmkv_ray.shard.allocator import Allocator, Assigned
from lmkv_ray.shard.chunks import Chunks
from lmkv_ray.shard.deltas import DeltaLog
from lmkv_ray.shard.devices import NodeDevices
from lmkv_ray.shard.extents import SlotUse
from lmkv_ray.shard.instructions import (
    AssignExtent,
    Free,
    Instruction,
    Publish,
    Reserve,
    Retire,
    Spoil,
)
from lmkv_ray.shard.leases import SPOILED, Holder, Leases
from lmkv_ray.shard.values import Counters, Limits, RecoveredSlot
from lmkv_ray.story import new_story
from lmkv_ray.tenants import overlap, tenant_within


class ShardState:
    """Everything a shard knows, except the bytes.

    Args:
        allocator: has no chunks yet; knows the size of the arena.
        owner: the shard's own process, which reserves slots for staging.
        deltas: collects changes for the directory.
        admission: collects chunks that are written to tiers; None: there are no tiers.
        limits: bounds on leases and times.
    """

    def __init__(
        self,
        allocator: Allocator,
        owner: Owner,
        deltas: DeltaLog,
        admission: Admission | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.owner = owner
        self.deltas = deltas
        self.limits = limits or Limits()
        self.counters = Counters()
        self._allocator, self._extents = allocator, allocator.extents
        admission = Admission(None) if admission is None else admission
        self.chunks = Chunks(allocator, deltas, admission, self.counters)
        """The ready chunks."""
        self.devices = NodeDevices(deltas)
        """Chunks in the prefix caches of attached engines."""
        self.kin_elsewhere: list[Kin] = []
        """Engines of other nodes, as the directory has told."""
        self._leases = Leases()
        self.story = new_story()
        """The last events, oldest first."""
        self._memory_again_at = float("inf")

    # -- engines ---------------------------------------------------------------------------------

    def hello(self, hello: Hello, now: float) -> tuple[Grant, list[Instruction]]:
        """An engine attaches, or does so again.

        ``held`` is the whole truth about what the engine holds: slots of a grant whose message was
        lost are free again, and those the predecessor granted and ``held`` names are its own.

        Raises:
            UnsupportedError: chunks of this size do not fit the arena.
            ArenaError: a later one has arrived before.
        """
        if not self._extents.fits(hello.slot_bytes):
            raise UnsupportedError(
                f"A chunk of {hello.slot_bytes} bytes does not fit the arena, whose slots have "
                f"{self._extents.min_slot_bytes} to {self._extents.extent_bytes} bytes.",
                next_step="set chunk_tokens or capacity so that a chunk fits.",
            )
        out: list[Instruction] = []
        deadline = now + self.limits.grant_seconds
        holder, back = self._leases.attach(
            hello, deadline, lambda slot: self._extents.slot_bytes(slot) == hello.slot_bytes
        )
        if spoiled := tuple(slot for slot, at in holder.leases.items() if at == SPOILED):
            out.append(Spoil(spoiled))
        self._free(back, out)
        self.devices.forget([hello.engine_id])
        self.story.append(("hello", now, hello.engine_id, len(holder.leases), len(back)))
        return Grant(slots=list(holder.leases), deadline=deadline), out

    def exchange(self, exchange: Exchange, now: float) -> tuple[ExchangeReply, list[Instruction]]:
        """An engine's batch: commits, then releases, then touches, then a new grant."""
        holder = self._leases.holders.get(exchange.engine_id)
        if holder is None or holder.attachment != exchange.attachment:
            return ExchangeReply(known=False), []
        out: list[Instruction] = []
        refused = self._commit(holder, exchange.commits, now, out)
        self._free(holder.take_back(exchange.released), out)
        self.chunks.touch(exchange.touched)
        self.devices.told(exchange.engine_id, exchange.device_added, exchange.device_removed)
        grant = None
        if exchange.want > 0:
            deadline = now + self.limits.grant_seconds
            slots = self._lease(holder, exchange.want, deadline, out)
            grant = Grant(slots=list(slots), deadline=deadline) if slots else None
        granted = len(grant.slots) if grant else 0
        self.story.append(
            ("exchange", now, exchange.engine_id, len(exchange.commits), len(refused), granted)
        )
        differs = differing(holder.kin, [*self.kin(), *self.kin_elsewhere])
        return ExchangeReply(grant=grant, refused=refused, differs=differs), out

    def owners(self) -> set[Owner]:
        """The owners whose end must be noticed (never the shard's own)."""
        return self._leases.owners() - {self.owner}

    def owner_gone(self, owner: Owner, now: float) -> None:
        """All processes of an owner have ended; its slots are quarantined, then free (``tick``)."""
        self._leases.owner_gone(owner, now + self.limits.grace_seconds)
        self.devices.keep(self._leases.holders)
        self.story.append(("owner_gone", now, owner.pid))

    def tick(self, now: float) -> list[Instruction]:
        """Time passes: slots whose quarantine is over become free."""
        out: list[Instruction] = []
        rested = self._leases.rested(now)
        self._free(rested, out)
        if rested:
            self.story.append(("rested", now, len(rested)))
        if now >= self._memory_again_at:
            self._memory_again_at = float("inf")
            self._extents.mark_available()
        return out

    def extent_failed(self, extent: int, now: float) -> frozenset[int]:
        """The memory of an extent that was just assigned could not be had; tried again later.

        Returns:
            slots of the extent that were leased by the same event; no engine must be told of them.
        """
        self._extents.mark_unavailable(extent)
        self._memory_again_at = now + self.limits.memory_seconds
        self.story.append(("extent_failed", now, extent))
        stride = self._extents.stride
        return self._leases.withdraw(range(extent * stride, (extent + 1) * stride))

    # -- staging: the shard fills slots itself ---------------------------------------------------

    def engine(self, engine_id: str) -> tuple[int, int] | None:
        """(space, slot_bytes) of an attached engine."""
        holder = self._leases.holders.get(engine_id)
        return (holder.space, holder.slot_bytes) if holder else None

    def reserve(self, space: int, slot_bytes: int, n: int) -> tuple[list[int], list[Instruction]]:
        """Up to ``n`` slots for the shard itself; they do not expire, but ``clear`` spoils them."""
        out: list[Instruction] = []
        slots = self._lease(self._leases.own(self.owner, space, slot_bytes), n, float("inf"), out)
        self.story.append(("reserve", None, space, n, len(slots)))
        return list(slots), out

    def commit(
        self, space: int, slot_bytes: int, commits: Sequence[Commit], now: float
    ) -> tuple[list[int], list[Instruction]]:
        """Publish what the shard staged; returns refused slots (cleared meanwhile), now free."""
        out: list[Instruction] = []
        refused = self._commit(self._leases.own(self.owner, space, slot_bytes), commits, now, out)
        self.story.append(("commit", now, space, len(commits), len(refused)))
        return refused, out

    def release(self, space: int, slot_bytes: int, slots: Iterable[int]) -> list[Instruction]:
        """The shard will not fill these slots, and no transfer writes into them any more."""
        out: list[Instruction] = []
        back = self._leases.own(self.owner, space, slot_bytes).take_back(slots)
        self._free(back, out)
        self.story.append(("release", None, space, len(back)))
        return out

    # -- chunks ----------------------------------------------------------------------------------

    def evict(self, keys: Iterable[bytes]) -> list[Instruction]:
        """Remove these chunks, pinned or not; unknown keys are ignored."""
        out = self.chunks.remove(keys, MissReason.EVICTED)
        self.story.append(("evict", None, sum(len(retire.slots) for retire in out)))
        return [*out]

    def clear(self, space: int | None = None) -> list[Instruction]:
        """Remove all chunks (of one space), and refuse those that are being filled right now."""
        out: list[Instruction] = [*self.chunks.clear(space)]
        # What is being filled began before the clear; published after it, it would come back.
        if spoiled := self._leases.spoil(space):
            out.append(Spoil(tuple(spoiled)))
        engines = self._leases.engines().items()
        self.devices.forget(name for name, holder in engines if overlap(space, holder.space))
        self.story.append(("clear", None, space, len(out)))
        return out

    def limit(self, slot_bytes: int) -> int:
        """Slots of this size that one holder may have."""
        quarter = self._extents.capacity(slot_bytes) // 4
        return min(self.limits.holder_slots, max(1, quarter))

    def delta(self, part: int = 0) -> Delta:
        """What to tell a part of the directory now (an empty delta is a heartbeat)."""
        return self.deltas.take(self.chunks, part, self.devices.content)

    def engines(self) -> dict[str, tuple[str, int, int]]:
        """Attached engines: (model, reserved slots, chunks on the device) by engine_id."""
        return {
            name: (holder.kin.model, len(holder.leases), self.devices.count(name))
            for name, holder in self._leases.engines().items()
        }

    def kin(self) -> list[Kin]:
        """One of each namespace of the attached engines."""
        return kinds(holder.kin for holder in self._leases.engines().values())

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
            alive: whether an owner still lives. Slots reserved by living owners are kept aside
                until the engine says ``hello`` or dies; others are quarantined.
            now: monotonic seconds.
        """
        rows = list(rows)
        by_extent: dict[int, list[int]] = {}
        for row in rows:
            by_extent.setdefault(row.slot // self._extents.stride, []).append(row.slot)
        for extent, slots in by_extent.items():
            self._extents.adopt(extent, extents[extent], slots)
        rows_of = Counter(row.key for row in rows)
        out: list[Instruction] = []
        for row in rows:
            if row.key is not None and rows_of[row.key] == 1:
                self.chunks.add(row.slot, row.key, row.nbytes, Hints(space=row.space))
                if row.pinned:  # by a user or a request: that is not known any more
                    self.chunks.pin([row.key], True)
            elif row.key is not None:  # never written so: trust neither
                self._extents.free(row.slot)
                out.append(Retire((row.slot,), MissReason.EVICTED))
            elif row.owner is not None and alive(row.owner):
                deadline = SPOILED if row.spoiled else now
                self._leases.orphans.setdefault(row.owner, {})[row.slot] = deadline
            else:
                self._leases.rest([row.slot], now + self.limits.grace_seconds)
        self.deltas.resync()
        self.story.append(("recover", now, len(rows), len(self.chunks)))
        return out

    # -- checking --------------------------------------------------------------------------------

    def validate(self) -> None:
        """Compare everything the shard knows with itself, for tests and simulations.

        Raises:
            AssertionError: something does not hold; the text says what.
        """
        self.chunks.validate()
        self.deltas.validate()
        self.devices.validate(self._leases.holders)
        reserved = self._leases.validate()
        use = self._extents.use.reshape(-1)
        known = set(np.flatnonzero(use == SlotUse.RESERVED).tolist())
        assert reserved == known, (
            f"slots {reserved ^ known} are reserved without an owner, or owned"
        )
        for name, holder in self._leases.holders.items():
            sizes = {self._extents.slot_bytes(slot) for slot in holder.leases}
            assert sizes <= {holder.slot_bytes}, f"{name} leases slots of {sizes} bytes"
            most = min(self.limits.holder_slots, self._extents.most(holder.slot_bytes) // 4)
            assert len(holder.leases) <= max(1, most), f"{name} leases {len(holder.leases)} slots"
        for slot_bytes in self._extents.classes:
            count = self._extents.reserved_slots(slot_bytes)
            most = max(1, self._extents.most(slot_bytes) // 2)
            assert count <= most, f"{count} slots of {slot_bytes} bytes are reserved, of {most}"

    # -- steps shared by the events --------------------------------------------------------------

    def _lease(
        self, holder: Holder, want: int, deadline: float, out: list[Instruction]
    ) -> tuple[int, ...]:
        """Up to ``want`` more slots, within the holder's share and half of the arena for all.

        A quarter of that half is the shard's own: else the grants of many idle engines would leave
        no slot to stage into.
        """
        capacity = self._extents.capacity(holder.slot_bytes)
        most = capacity // 2 if holder.owner == self.owner else capacity * 3 // 8
        n = min(
            want,
            self.limit(holder.slot_bytes) - len(holder.leases),
            max(1, most) - self._extents.reserved_slots(holder.slot_bytes),
        )
        taken = self._allocator.take(holder.slot_bytes, n)
        for step in taken.steps:
            if isinstance(step, Assigned):
                out.append(AssignExtent(step.extent, step.slot_bytes))
            else:
                out += self.chunks.gone(step, MissReason.EVICTED)
        if taken.slots:
            out.append(Reserve(taken.slots, holder.owner))
            holder.leases.update(dict.fromkeys(taken.slots, deadline))
        self.counters.granted += len(taken.slots)
        self.counters.ungranted += want - len(taken.slots)
        return taken.slots

    def _commit(
        self, holder: Holder, commits: Sequence[Commit], now: float, out: list[Instruction]
    ) -> list[int]:
        """Publish what may be published; what is wrong with one costs nothing of the others."""
        refused: list[int] = []
        back: list[int] = []
        accepted: dict[bytes, Commit] = {}
        pinned: list[bytes] = []
        for commit in commits:
            deadline = holder.leases.pop(commit.slot, None)
            sound = len(commit.key) == KEY_BYTES and 0 <= commit.nbytes <= holder.slot_bytes
            if deadline is None:
                refused.append(commit.slot)  # not the holder's: leave the slot alone
            elif now > deadline or not sound:
                refused.append(commit.slot)
                back.append(commit.slot)
            elif commit.key in self.chunks or commit.key in accepted:
                self.counters.duplicate += 1
                back.append(commit.slot)
                if commit.hints.pinned:
                    pinned.append(commit.key)
            else:
                accepted[commit.key] = commit
        # Head last, so that of one batch of a prompt the tail is evicted first.
        for key, commit in reversed([*accepted.items()]):
            hints = self._hints(commit.hints, holder, now)
            if not self.chunks.add(commit.slot, key, commit.nbytes, hints):
                back.append(commit.slot)
                del accepted[key]
        for key in pinned:
            self.chunks.pin_for_request(key)
        if accepted:
            out.append(
                Publish(
                    slots=tuple(commit.slot for commit in accepted.values()),
                    keys=tuple(accepted),
                    nbytes=tuple(commit.nbytes for commit in accepted.values()),
                    spaces=tuple(self.chunks.space(key) or 0 for key in accepted),
                )
            )
            self.chunks.added(accepted)
        self._free(back, out)
        self.counters.refused += len(refused)
        return refused

    def _hints(self, hints: Hints, holder: Holder, now: float) -> Hints:
        """Hints that policies can calculate with; of unsound ones nothing is believed."""
        hints = replace(hints, space=tenant_within(holder.space, hints.space))
        if hints.sound(now):
            return hints
        self.counters.unsound += 1
        return Hints(space=hints.space)

    def _free(self, slots: Iterable[int], out: list[Instruction]) -> None:
        freed = tuple(slots)
        for slot in freed:
            self._extents.free(slot)
        if freed:
            out.append(Free(freed))
