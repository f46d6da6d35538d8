"""Which engines may fill which slots, and until when."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lmkv_ray.errors import ArenaError
from lmkv_ray.messages import Hello, Kin, Owner
from lmkv_ray.tenants import overlap

NO_KIN = Kin(model="", space=0, fields={})
SPOILED = float("-inf")
"""The deadline of a lease that a ``clear`` ended: whatever happens, its commit is refused."""


@dataclass(slots=True)
class Holder:
    """An engine, or the shard itself for one space and slot size."""

    owner: Owner
    space: int
    slot_bytes: int
    kin: Kin = NO_KIN
    """What other engines are told about this one."""
    attachment: int = 0
    """Number of the engine's last ``Hello``."""
    leases: dict[int, float] = field(default_factory=dict)
    """Slot -> deadline."""

    def take_back(self, slots: Iterable[int]) -> list[int]:
        """End leases; returns those there were."""
        return [slot for slot in slots if self.leases.pop(slot, None) is not None]


class Leases:
    """Slots that are reserved, and why.

    A lease ends when its holder says so, never by a timer: a worker that was frozen in the middle
    of a copy would, when it wakes, write into a slot that is another's. After its deadline its
    commit is refused, and that is all; what frozen engines hold is bounded by their share. When all
    processes of the holder have ended, its slots rest for a moment. *Orphans* are slots of owners
    that live and have not said hello (again): the shard's predecessor leased them, or another
    process has taken the engine's name.
    """

    def __init__(self) -> None:
        # Engines by their id, and the shard itself by space and slot size.
        self.holders: dict[str | tuple[int, int], Holder] = {}
        self.orphans: dict[Owner, dict[int, float]] = {}
        """Owner -> slot -> deadline."""
        self.resting: deque[tuple[float, tuple[int, ...]]] = deque()

    def attach(
        self, hello: Hello, deadline: float, fits: Callable[[int], bool]
    ) -> tuple[Holder, list[int]]:
        """An engine says what it holds; that is the whole truth.

        Between the message and its answer the engine is told of no slot. So into what it does not
        name it does not write, as long as older messages are refused.

        Args:
            hello: the message of the engine.
            deadline: seconds at which all leases of the engine end, if it does not say hello again.
            fits: whether a slot has the engine's size.

        Returns:
            the engine, and slots it had and does not name: it was never told of them, or has handed
            them back in a message that got lost.

        Raises:
            ArenaError: a later message of the engine has arrived before.
        """
        before, owner = self.holders.get(hello.engine_id), hello.owner
        old = {}
        if before is not None and before.owner != owner:
            self.orphans.setdefault(before.owner, {}).update(before.leases)
        elif before is not None:
            if hello.attachment < before.attachment:
                raise ArenaError(
                    "This Hello was overtaken by a later one.", next_step="nothing; it was late."
                )
            old = before.leases
        old |= self.orphans.pop(owner, {})
        kin = Kin(model=hello.model, space=hello.space, fields=hello.fields)
        holder = Holder(owner, hello.space, hello.slot_bytes, kin, hello.attachment)
        self.holders[hello.engine_id] = holder
        same = before is None or before.space == hello.space
        for slot in dict.fromkeys(hello.held):
            lease = old.pop(slot, None)
            # Until the holder hands a slot back, a worker may be writing into it: also into one
            # of another space, which must not be committed now, or of another size.
            if lease is not None and fits(slot):
                holder.leases[slot] = deadline if same and lease != SPOILED else SPOILED
            elif lease is not None:
                self.orphans.setdefault(owner, {})[slot] = lease
        return holder, list(old)

    def own(self, owner: Owner, space: int, slot_bytes: int) -> Holder:
        """The shard itself, as the holder of slots for one space."""
        return self.holders.setdefault((space, slot_bytes), Holder(owner, space, slot_bytes))

    def engines(self) -> dict[str, Holder]:
        """All holders but the shard itself."""
        return {name: holder for name, holder in self.holders.items() if isinstance(name, str)}

    def owners(self) -> set[Owner]:
        """All processes that hold slots."""
        return {holder.owner for holder in self.holders.values()} | self.orphans.keys()

    def owner_gone(self, owner: Owner, until: float) -> None:
        """All processes of an owner have ended; its slots rest until then."""
        for name in [name for name, holder in self.holders.items() if holder.owner == owner]:
            self.rest(self.holders.pop(name).leases, until)
        self.rest(self.orphans.pop(owner, {}), until)

    def rest(self, slots: Iterable[int], until: float) -> None:
        """No engine may have these slots until then; later calls have later times."""
        if resting := tuple(slots):
            self.resting.append((until, resting))

    def rested(self, now: float) -> list[int]:
        """Slots that have rested enough; they are the caller's now."""
        slots: list[int] = []
        while self.resting and self.resting[0][0] <= now:
            slots += self.resting.popleft()[1]
        return slots

    def spoil(self, space: int | None) -> list[int]:
        """Refuse whatever is being filled now (in one space); which slots these are."""
        spoiled: list[int] = []
        for holder in self.holders.values():
            if overlap(space, holder.space):
                holder.leases = dict.fromkeys(holder.leases, SPOILED)
                spoiled += holder.leases
        for owner, slots in self.orphans.items():  # of which space is not known
            self.orphans[owner] = dict.fromkeys(slots, SPOILED)
            spoiled += slots
        return spoiled

    def withdraw(self, slots: range) -> frozenset[int]:
        """End the leases of slots that do not exist any more; returns those that were leased."""
        return frozenset(
            slot for holder in self.holders.values() for slot in holder.take_back(slots)
        )

    def validate(self) -> set[int]:
        """Check that no slot has two owners, for tests and simulations.

        Returns:
            all slots that are reserved.

        Raises:
            AssertionError: a slot is named twice; the text says which.
        """
        slots = [slot for holder in self.holders.values() for slot in holder.leases]
        slots += [slot for orphans in self.orphans.values() for slot in orphans]
        slots += [slot for _, resting in self.resting for slot in resting]
        reserved = set(slots)
        assert len(slots) == len(reserved), (
            f"slots {[slot for slot, count in Counter(slots).items() if count > 1]} have two owners"
        )
        return reserved
