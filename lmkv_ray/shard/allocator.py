"""Which slot holds which chunk, and which chunks are evicted when slots are needed."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lmkv_ray.complaints import Complaints
from lmkv_ray.hints import NO_HINTS, Hints
from lmkv_ray.policies import Policy
from lmkv_ray.shard.extents import Extents, SizeClass

logger = logging.getLogger(__name__)

REQUEST_PINS = 0.125
"""Share of the slots of one size class that requests may pin, if nothing else is said."""


@dataclass(frozen=True, slots=True)
class Evicted:
    """Ready chunks that were removed to make room; their slots are free (or unassigned)."""

    slots: tuple[int, ...]
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Assigned:
    """An extent was cut into slots of ``slot_bytes``."""

    extent: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class TakenSlots:
    """Slots that are reserved now, and the steps taken to get them, in order."""

    slots: tuple[int, ...]
    steps: tuple[Evicted | Assigned, ...]


class Allocator:
    """Hands out slots; evicts to make room; always makes progress.

    A class that needs room takes an unassigned extent, else evicts its own victims. It takes over
    another class's coldest extent when it has no chunk left to evict, or when everything in that
    extent was used less recently than its own next victim (so a model that is no longer
    served gives its memory to the others). Extents with reserved slots or pinned chunks cannot be
    taken over; when only such are left, one is drained: none of its slots is reserved any more, and
    it becomes unassigned when its last reserved slot is free. So a pinned chunk gives way only to a
    model that would have no memory at all.

    A policy calculates with hints that come from requests. An error in it costs the chunk that was
    to be added, or for a moment the order in which chunks go: never a slot, and no chunk of others.

    Args:
        extents: number of extents in the arena.
        extent_bytes: size of an extent, in bytes.
        min_slot_bytes: size of the smallest slot, in bytes.
        make_policy: makes the eviction policy of a size class.
        request_pins: share of the slots of one size class that requests may pin.
    """

    def __init__(
        self,
        extents: int,
        extent_bytes: int,
        min_slot_bytes: int,
        make_policy: Callable[[], Policy],
        *,
        request_pins: float = REQUEST_PINS,
    ) -> None:
        self.policy_errors = 0
        """How often a policy raised."""
        self._complaints = Complaints(logger)
        self._request_pins = request_pins
        self.extents = Extents(extents, extent_bytes, min_slot_bytes, make_policy)
        self.slot_of: dict[bytes, int] = {}
        """Key -> slot, for every ready chunk."""
        self._key_of: dict[int, bytes] = {}
        self._stride, self._class_of = self.extents.stride, self.extents.class_of
        self._pinned_chunks = [0] * extents  # how many each extent has
        # When each ready chunk was last used, by a counter of uses; 0 for slots without chunk.
        self._used_at = np.zeros((extents, self._stride), dtype=np.int64)
        self._used = self._used_at.reshape(-1)  # by slot
        self._clock = 0

    # -- what there is ---------------------------------------------------------------------------

    def size_and_pin(self, key: bytes) -> tuple[int, bool]:
        """(size of its slot in bytes, whether the chunk is pinned) for the key of a ready chunk."""
        size = self._class_of[self.slot_of[key] // self._stride]
        assert size is not None
        return size.slot_bytes, key in size.policy.pinned

    def by_worth(self) -> list[bytes]:
        """All ready chunks: the pinned ones, then the last used first."""
        pinned = self.pinned_chunks()
        keys = list(self.slot_of)
        slots = np.fromiter(self.slot_of.values(), np.int64, len(keys))
        order = np.argsort(-self._used[slots])
        return list(dict.fromkeys([*pinned, *(keys[i] for i in order.tolist())]))

    def pinned_chunks(self) -> list[bytes]:
        """Chunks that are not evicted to make room."""
        return [key for size in self.extents.classes.values() for key in size.policy.pinned]

    # -- what happens to chunks ------------------------------------------------------------------

    def take(self, slot_bytes: int, n: int) -> TakenSlots:
        """Reserve up to ``n`` free slots, evicting and assigning extents as needed."""
        if n <= 0:
            return TakenSlots((), ())
        steps: list[Evicted | Assigned] = []
        self._finish_drain(steps)
        size = self.extents.size_class(slot_bytes)
        while self._make_room(size, n, steps):
            pass
        slots = self.extents.take(size, n)
        if not slots:
            self._start_drain(size)
        self.extents.discard(size)
        return TakenSlots(slots, tuple(steps))

    def fill(self, slot: int, key: bytes, hints: Hints = NO_HINTS) -> bool:
        """A reserved slot is ready: it holds the chunk ``key``, which no other slot holds.

        Returns:
            False: the policy does not take the key. Nothing was changed.
        """
        size = self._class_of[slot // self._stride]
        assert size is not None
        try:
            size.policy.added(key, hints)
        except Exception as error:
            self._failed(error)
            self._forget(size, key)
            return False
        self.extents.mark_ready(slot)
        self.slot_of[key] = slot
        self._key_of[slot] = key
        self._mark_used(slot)
        if hints.pinned:
            self.pin_for_request(key)
        return True

    def evict(self, keys: Iterable[bytes]) -> Evicted:
        """Remove these chunks, which are all ready."""
        keys = tuple(keys)
        slots = tuple(self.slot_of[key] for key in keys)
        for slot, key in zip(slots, keys, strict=True):
            size = self._class_of[slot // self._stride]
            assert size is not None
            self._pinned_chunks[slot // self._stride] -= key in size.policy.pinned
            self._forget(size, key)
            del self.slot_of[key], self._key_of[slot]
            self._used[slot] = 0
            self.extents.release(slot)
        return Evicted(slots, keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Chunks were hit, deepest chunk of a prompt first; unknown keys are ignored."""
        by_class: dict[int, list[bytes]] = {}
        for key in keys:
            slot = self.slot_of.get(key)
            if slot is not None:
                self._mark_used(slot)
                size = self._class_of[slot // self._stride]
                assert size is not None
                by_class.setdefault(size.slot_bytes, []).append(key)
        for slot_bytes, own in by_class.items():
            try:
                self.extents.classes[slot_bytes].policy.touched(own)
            except Exception as error:
                self._failed(error)

    def pin(self, key: bytes, pinned: bool) -> bool:
        """Pin or unpin a chunk; returns whether the chunk is pinned now.

        Unknown keys are ignored. Of one size class, half of the slots it may have can be pinned.
        """
        slot = self.slot_of.get(key)
        if slot is None:
            return False
        extent = slot // self._stride
        size = self._class_of[extent]
        assert size is not None
        keys = size.policy.pinned
        room = 2 * (len(keys) + 1) <= self.extents.capacity(size.slot_bytes)
        if pinned and key not in keys and room:
            self._pinned_chunks[extent] += 1
            size.policy.pin(key, True)
        elif not pinned and key in keys:
            self._pinned_chunks[extent] -= 1
            size.policy.pin(key, False)
        return key in keys

    def pin_for_request(self, key: bytes) -> bool:
        """Pin a chunk for a request. All requests together may pin ``request_pins`` of the slots.

        Returns:
            whether the chunk is pinned now, by a request or by a user.
        """
        slot = self.slot_of.get(key)
        size = None if slot is None else self._class_of[slot // self._stride]
        if size is None:
            return False
        policy, room = size.policy, self._request_pins * self.extents.capacity(size.slot_bytes)
        if key not in policy.pinned and len(policy.of_requests) + 1 <= room and self.pin(key, True):
            policy.of_requests.add(key)
        return key in policy.pinned

    # -- checking --------------------------------------------------------------------------------

    def validate(self) -> None:
        """Compare chunks, slots and policies with each other, for tests and simulations.

        Raises:
            AssertionError: they contradict each other; the text says how.
        """
        self.extents.validate()
        assert {slot: key for key, slot in self.slot_of.items()} == self._key_of, (
            "two chunks are in one slot, or the two maps of slots and keys differ"
        )
        ready = [
            slot for extent in range(self.extents.count) for slot in self.extents.ready(extent)
        ]
        assert self._key_of.keys() == set(ready), "ready slots are not those that hold chunks"
        assert np.flatnonzero(self._used).tolist() == ready, "free slots have a time of use"
        pinned = [0] * self.extents.count
        chunks = dict.fromkeys(self.extents.classes, 0)
        for slot in ready:
            size = self._class_of[slot // self._stride]
            assert size is not None
            chunks[size.slot_bytes] += 1
            pinned[slot // self._stride] += self._key_of[slot] in size.policy.pinned
        assert pinned == self._pinned_chunks, f"{pinned} pins, counted {self._pinned_chunks}"
        for slot_bytes, size in self.extents.classes.items():
            policy = size.policy
            assert policy.of_requests <= policy.pinned, "a pin of requests is no pin"
            for key in policy.pinned:
                at = self.slot_of.get(key)
                owner = None if at is None else self._class_of[at // self._stride]
                assert owner is size, (
                    f"{key.hex()} is pinned in the class of {slot_bytes} bytes and not there"
                )
            if not self.policy_errors:
                assert len(policy) == chunks[slot_bytes], (
                    f"the policy knows {len(policy)} of {chunks[slot_bytes]} chunks"
                )

    # -- making room -----------------------------------------------------------------------------

    def _make_room(self, size: SizeClass, n: int, steps: list[Evicted | Assigned]) -> bool:
        """One step towards ``n`` free slots and a few that rest; False: enough, or no step left."""
        # Evicted slots rest a little at the tail of the queue before they are written again.
        slots = len(size.extents) * (self.extents.extent_bytes // size.slot_bytes)
        short = n + min(64, slots // 32) - len(size.free)
        if short <= 0:
            return False
        if self._assign(size, steps):
            return True
        victims = self._victims(size, short)
        if len(size.free) < n:
            oldest = int(self._used[self.slot_of[victims[0]]]) if victims else None
            extent = self._coldest(size, oldest)
            if extent is not None:
                steps.append(self._clear(extent))
                return self._assign(size, steps)
        if victims:
            steps.append(self.evict(victims))
        return bool(victims)

    def _assign(self, size: SizeClass, steps: list[Evicted | Assigned]) -> bool:
        extent = self.extents.assign(size)
        if extent is not None:
            steps.append(Assigned(extent, size.slot_bytes))
        return extent is not None

    def _coldest(self, size: SizeClass, older_than: int | None) -> int | None:
        """The extent of another class whose last use is longest ago, if it may be taken over."""
        reserved, pinned = self.extents.reserved, self._pinned_chunks
        others = [e for e in self.extents.of_others(size) if not (reserved[e] or pinned[e])]
        if not others:
            return None
        last_used = self._used_at[others].max(axis=1)
        coldest = int(last_used.argmin())
        if older_than is not None and last_used[coldest] >= older_than:
            return None
        return others[coldest]

    def _start_drain(self, size: SizeClass) -> None:
        others = self.extents.of_others(size)
        if self.extents.draining is None and others:
            reserved, pinned = self.extents.reserved, self._pinned_chunks
            self.extents.drain(min(others, key=lambda extent: (reserved[extent], pinned[extent])))

    def _finish_drain(self, steps: list[Evicted | Assigned]) -> None:
        extent = self.extents.draining
        if extent is not None and not self.extents.reserved[extent]:
            steps.append(self._clear(extent))

    def _clear(self, extent: int) -> Evicted:
        """Evict everything in an extent without reserved slots, and leave it unassigned."""
        evicted = self.evict(self._key_of[slot] for slot in self.extents.ready(extent))
        self.extents.vacate(extent)
        return evicted

    def _victims(self, size: SizeClass, n: int) -> list[bytes]:
        """What the policy names; if that makes no sense, the least recently used."""
        try:
            named = size.policy.victims(n)
            if all(key in self.slot_of for key in named):
                return named
            raise LookupError("victims that are not there")
        except Exception as error:
            self._failed(error)
        keys = (
            key
            for key, slot in self.slot_of.items()
            if self._class_of[slot // self._stride] is size and key not in size.policy.pinned
        )
        return heapq.nsmallest(n, keys, key=lambda key: self._used[self.slot_of[key]])

    def _forget(self, size: SizeClass, key: bytes) -> None:
        try:
            size.policy.removed(key)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.policy_errors += 1
        self._complaints.say("the eviction policy failed; going on.", error=error)

    def _mark_used(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock
