"""Who may fill which slots, and until when."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lmkv_ray.messages import Hello, Owner
from lmkv_ray.tenants import overlap

SPOILED = float("-inf")
"""The deadline of a lease that a ``clear`` ended: whatever happens, its commit is refused."""


@dataclass(slots=True)
class Holder:
    """An engine, or the shard itself for one space and slot size."""

    owner: Owner
    space: int
    slot_bytes: int
    model: str = ""
    leases: dict[int, float] = field(default_factory=dict)
    """Slot -> deadline."""

    def take_back(self, slots: Iterable[int]) -> list[int]:
        """End leases; returns those there were."""
        return [slot for slot in slots if self.leases.pop(slot, None) is not None]


class Leases:
    """Slots that are reserved, and why.

    A lease ends when its holder says so, never by a timer: a worker that was frozen in the middle
    of a copy would, when it wakes, write into a slot that is another's. After its deadline its
    commit is refused, and that is all; what frozen engines hold is bounded by their share. When the
    holder's process dies its slots rest for a while, as its workers may outlive it. *Orphans* were
    leased by the shard's predecessor, to processes that live and have not said hello yet.
    """

    def __init__(self) -> None:
        # Engines by their id, and the shard itself by space and slot size.
        self.holders: dict[str | tuple[int, int], Holder] = {}
        self.orphans: dict[int, Owner] = {}
        self.resting: deque[tuple[float, tuple[int, ...]]] = deque()

    def attach(
        self, hello: Hello, deadline: float, until: float, fits: Callable[[int], bool]
    ) -> tuple[Holder, list[int]]:
        """An engine says what it holds; that is the whole truth.

        Args:
            hello: the engine's.
            deadline: for all its leases.
            until: when slots of a dead namesake have rested enough.
            fits: whether a slot has the engine's size.

        Returns:
            the engine, and slots it was leased and does not name: it was never told of them, or
            has handed them back in a message that got lost.
        """
        before = self.holders.get(hello.engine_id)
        old: dict[int, float] = {}
        if before is not None and before.owner == hello.owner:
            old = before.leases
        elif before is not None:
            self.rest(before.leases, until)
        holder = Holder(hello.owner, hello.space, hello.slot_bytes, hello.model)
        self.holders[hello.engine_id] = holder
        same = before is None or before.space == hello.space
        for slot in dict.fromkeys(hello.held):
            lease = old.get(slot)
            if lease is None and self.orphans.get(slot) == hello.owner:
                lease = old[slot] = deadline
                del self.orphans[slot]
            # What is filled in another space must not be committed now; but until the holder hands
            # the slot back, a worker may be writing into it.
            if lease is not None and fits(slot):
                holder.leases[slot] = deadline if same and lease != SPOILED else SPOILED
        return holder, [slot for slot in old if slot not in holder.leases]

    def own(self, owner: Owner, space: int, slot_bytes: int) -> Holder:
        """The shard itself, as the holder of slots for one space."""
        return self.holders.setdefault((space, slot_bytes), Holder(owner, space, slot_bytes))

    def engines(self) -> dict[str, Holder]:
        """All holders but the shard itself."""
        return {name: holder for name, holder in self.holders.items() if isinstance(name, str)}

    def owners(self) -> set[Owner]:
        """All processes that hold slots."""
        return {holder.owner for holder in self.holders.values()} | set(self.orphans.values())

    def owner_gone(self, owner: Owner, until: float) -> None:
        """A process died; its slots rest until then."""
        for name in [name for name, holder in self.holders.items() if holder.owner == owner]:
            self.rest(self.holders.pop(name).leases, until)
        orphans = [slot for slot, its in self.orphans.items() if its == owner]
        for slot in orphans:
            del self.orphans[slot]
        self.rest(orphans, until)

    def rest(self, slots: Iterable[int], until: float) -> None:
        """Nobody may have these until then; later calls have later times."""
        if resting := tuple(slots):
            self.resting.append((until, resting))

    def rested(self, now: float) -> list[int]:
        """Slots that have rested enough; they are the caller's now."""
        slots: list[int] = []
        while self.resting and self.resting[0][0] <= now:
            slots += self.resting.popleft()[1]
        return slots

    def spoil(self, space: int | None) -> None:
        """Refuse whatever is being filled now (in one space)."""
        for holder in self.holders.values():
            if overlap(space, holder.space):
                holder.leases = dict.fromkeys(holder.leases, SPOILED)

    def lose(self, slots: range) -> frozenset[int]:
        """There are no such slots; returns those that were leased."""
        return frozenset(
            slot for holder in self.holders.values() for slot in holder.take_back(slots)
        )
