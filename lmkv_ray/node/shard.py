"""The chunks of one node: the state machine and the arena, kept in step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec
import numpy as np
import xxhash

from lmkv_ray.arena import ArenaReader, ArenaWriter
from lmkv_ray.config import Settings
from lmkv_ray.errors import ArenaError, ChunkSizeError
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import (
    Commit,
    Exchange,
    ExchangeReply,
    Grant,
    Hello,
    MissReason,
    StageReply,
)
from lmkv_ray.node.machine import Machine
from lmkv_ray.policies import make_policy
from lmkv_ray.shard import (
    Admission,
    Allocator,
    AssignExtent,
    DeltaLog,
    Free,
    Instruction,
    Limits,
    Publish,
    RecoveredSlot,
    Refusals,
    Reserve,
    Retire,
    ShardState,
    Spoil,
)

logger = logging.getLogger(__name__)


class Shard:
    """All that happens to one node's chunks, on one thread.

    Args:
        writer: the arena, new or adopted.
        settings: those of this node.
        node_id: the id by which the directory knows this node.
        machine: time, and whether processes live.
    """

    def __init__(
        self, writer: ArenaWriter, settings: Settings, node_id: str, machine: Machine
    ) -> None:
        self.writer = writer
        self.clock = machine.clock
        self._is_alive = machine.is_alive
        geometry = writer.geometry
        self.stride = geometry.slots_per_extent
        self.reader = ArenaReader.attach(writer.path, writer.arena_id)
        self._allocator = allocator = Allocator(
            geometry.extents,
            geometry.extent_bytes,
            geometry.min_slot_bytes,
            lambda: make_policy(settings.eviction_policy, tenant_share=settings.tenant_share),
            request_pins=settings.request_pins,
        )
        self.state = ShardState(
            allocator,
            machine.process,
            DeltaLog(node_id, int(machine.clock.wall() * 1e9), settings.directory_parts),
            Admission(settings.tier_admission if settings.has_tiers else None),
            Limits(grant_seconds=settings.grant_seconds),
        )
        self.clears = 0
        """How often chunks were cleared; what was planned before a clear must not be done after."""
        self.refusals = Refusals()
        """Engines whose chunks do not fit."""
        self._pins: dict[int, bytes] = {}
        """What the arena says is pinned: slots and their keys."""
        self.cleared = writer.cleared
        """The last clear of the cache from which nothing is served any more."""
        self.changed: Callable[[], None] = _nothing
        """Called after every event that may leave work for a loop of the node."""
        self._recover()

    @property
    def capacity(self) -> int:
        """Bytes for payloads."""
        return self.writer.geometry.capacity

    def hello(self, hello: Hello) -> Grant:
        """Attach an engine.

        Raises:
            ArenaError: its chunks do not fit (``ChunkSizeError``; the status says it then), its
                processes are not visible to the shard, or a later Hello has arrived before.
        """
        for process in (hello.owner, *hello.writers):
            if not self._is_alive(process):
                raise ArenaError(
                    f"The shard does not see the engine's process {process.pid}.",
                    next_step="run engine and shard in one container (one pid namespace).",
                )
        try:
            size = self.writer.geometry.slot_size(hello.slot_bytes)
        except ChunkSizeError as error:
            why = f"{hello.model} is served without cache: {error}"
            if self.refusals.refused(hello.engine_id, why, self.clock.monotonic()):
                logger.error("lmkv_ray: %s", why)
            raise
        self.refusals.accepted(hello.engine_id)
        number = xxhash.xxh3_64_intdigest(hello.engine_id.encode()) or 1
        owner = msgspec.structs.replace(hello.owner, engine=number)
        hello = msgspec.structs.replace(hello, slot_bytes=size, owner=owner)
        self.writer.crews.join(owner, hello.writers)
        grant, instructions = self.state.hello(hello, self.clock.monotonic())
        self._apply(instructions)
        return grant

    def exchange(self, exchange: Exchange) -> ExchangeReply:
        """Handle an engine's batch."""
        reply, instructions = self.state.exchange(exchange, self.clock.monotonic())
        lost = self._apply(instructions)
        if lost and reply.grant is not None:
            slots = [slot for slot in reply.grant.slots if slot not in lost]
            grant = msgspec.structs.replace(reply.grant, slots=slots)
            reply = msgspec.structs.replace(reply, grant=grant)
        return reply

    def reserve(self, space: int, slot_bytes: int, n: int) -> list[int]:
        """Slots to stage chunks into; maybe fewer, maybe none."""
        slots, instructions = self.state.reserve(space, slot_bytes, n)
        lost = self._apply(instructions)
        return [slot for slot in slots if slot not in lost]

    def commit(
        self, space: int, slot_bytes: int, commits: Sequence[Commit], checksums: Sequence[int]
    ) -> None:
        """Publish staged chunks; those that were cleared meanwhile are dropped."""
        now = self.clock.monotonic()
        known = {commit.slot: value for commit, value in zip(commits, checksums, strict=True)}
        self._apply(self.state.commit(space, slot_bytes, commits, now)[1], known)

    def release(self, space: int, slot_bytes: int, slots: Iterable[int]) -> None:
        """Give back slots that were reserved and not committed; committed ones are ignored."""
        self._apply(self.state.release(space, slot_bytes, slots))

    def pin(self, keys: Iterable[bytes], pinned: bool) -> list[bytes]:
        """Keep chunks from being evicted to make room, or no longer; which are pinned now."""
        kept = self.state.chunks.pin(keys, pinned)
        self._note_pins()
        return kept

    def evict(self, keys: Iterable[bytes]) -> None:
        """Remove these chunks, pinned or not."""
        self._apply(self.state.evict(keys))

    def clear(self, space: int | None) -> None:
        """Remove all chunks (of one space)."""
        self.clears += 1
        self._apply(self.state.clear(space))

    def settle(self) -> None:
        """The last clear has been carried out everywhere below memory too: the arena remembers it,
        and a successor is not told of it again.
        """
        if self.writer.cleared != self.cleared:
            self.writer.cleared = self.cleared

    def tick(self) -> None:
        """Notice dead engines and elapsed time."""
        now = self.clock.monotonic()
        crews = self.writer.crews
        for owner in self.state.owners() | crews.owners():
            if not crews.alive(owner):
                self.state.owner_gone(owner, now)
                crews.dismiss(owner)
        self._apply(self.state.tick(now))
        self._note_pins()

    def why_missing(self, key: bytes) -> MissReason:
        """Why a key is not here, as the arena remembers."""
        return self.reader.reasons(key_array(key))[0]

    def located(self, reply: StageReply, keys: bytes, nbytes: int) -> StageReply:
        """An answer to a ``Stage`` of these keys that also says where they are.

        Args:
            reply: the answer.
            keys: those that were asked for.
            nbytes: of each chunk; one of another size is not the engine's.
        """
        hits = self.reader.lookup(key_array(keys)).of_size(nbytes)
        return msgspec.structs.replace(
            reply,
            arena_id=self.reader.arena_id,
            slots=hits.slots.tolist(),
            generations=hits.generations.tolist(),
        )

    def counters(self) -> dict[str, int]:
        """See ``shard.Counters``; the others: see ``shard.Admission`` and ``shard.Allocator``."""
        return asdict(self.state.counters) | {
            "missed": self.state.chunks.admission.missed,
            "policy_errors": self._allocator.policy_errors,
        }

    def close(self) -> None:
        """Let go of the arena."""
        self.reader.close()
        self.writer.close()

    def _note_pins(self) -> None:
        """Let the arena, and so a successor, know what is pinned."""
        chunks, before = self.state.chunks, self._pins
        pins = {slot: key for key in chunks.pinned() if (slot := chunks.slot(key)) is not None}
        if pins != before:
            self.writer.set_pinned(_slots(before.keys() - pins.keys()), False)
            new = [slot for slot, key in pins.items() if before.get(slot) != key]
            self.writer.set_pinned(_slots(new), True)
            self._pins = pins

    def _recover(self) -> None:
        content = self.writer.scan()
        keys = key_list(content.keys)
        ready = zip(
            content.ready.tolist(),
            keys,
            content.spaces.tolist(),
            content.nbytes.tolist(),
            content.pinned.tolist(),
            strict=True,
        )
        rows = [
            RecoveredSlot(slot=slot, key=key, space=space, nbytes=nbytes, pinned=pinned)
            for slot, key, space, nbytes, pinned in ready
        ]
        rows += [
            RecoveredSlot(slot=slot, key=None, owner=owner, spoiled=slot in content.spoiled)
            for slot, owner in content.reserved.items()
        ]
        now, alive = self.clock.monotonic(), self.writer.crews.alive
        self._apply(self.state.recover(content.slot_bytes.tolist(), rows, alive, now))
        if rows:
            logger.info("lmkv_ray: adopted an arena with %d chunks", len(keys))

    def _apply(
        self, instructions: Iterable[Instruction], checksums: Mapping[int, int] | None = None
    ) -> frozenset[int]:
        """Obey the state machine; returns slots there was no memory for."""
        lost: frozenset[int] = frozenset()
        for instruction in instructions:
            match instruction:
                case AssignExtent(extent, slot_bytes):
                    try:
                        self.writer.assign_extent(extent, slot_bytes)
                    except ArenaError as error:
                        logger.error("lmkv_ray: %s", error)
                        lost |= self.state.extent_failed(extent, self.clock.monotonic())
                case Reserve(slots, owner):
                    self.writer.reserve(_slots(s for s in slots if s not in lost), owner)
                case Publish(slots, keys, nbytes, spaces):
                    values = [(checksums or {}).get(slot, 0) for slot in slots]
                    joined = key_array(b"".join(keys))
                    sizes = np.array(nbytes, np.int64)
                    self.writer.publish(
                        _slots(slots),
                        joined,
                        sizes,
                        np.array(spaces, np.uint64),
                        np.array(values, np.uint64),
                    )
                case Retire(slots, reason):
                    self.writer.retire(_slots(slots), reason)
                case Spoil(slots):
                    self.writer.spoil(_slots(slots))
                case Free(slots):
                    self.writer.free(_slots(slots))
        self.changed()
        return lost


def _nothing() -> None:
    """Called for each change, until a listener is set."""


def _slots(slots: Iterable[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.fromiter(slots, np.int64)
