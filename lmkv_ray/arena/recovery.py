"""What a shard finds in the arena of its predecessor, which may have been killed at any point.

The slot table is the truth and the index follows from it. A slot counts as ready only if both its
state and its generation say so; what was being committed or retired is dropped; reservations stay,
as their owners may still be writing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena.format import PAGE, SlotArray, SlotState, Tables, is_readable
from lmkv_ray.errors import ArenaError
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import Owner


@dataclass(frozen=True)
class ArenaContent:
    """What a shard finds in the arena of its predecessor."""

    slot_bytes: npt.NDArray[np.int64]
    """int64[extents]; 0: not assigned."""
    ready: SlotArray
    """Slots that hold chunks, each key once."""
    keys: KeyArray
    nbytes: npt.NDArray[np.int64]
    spaces: npt.NDArray[np.uint64]
    pinned: npt.NDArray[np.bool_]
    reserved: dict[int, Owner]
    """Slots that a process may still be writing into."""
    spoiled: frozenset[int]
    """Those of them that a clear came for."""


def scan(tables: Tables) -> ArenaContent:
    """All that is in an arena."""
    slots = _existing(tables)
    states = tables.slots["state"][slots]
    ready = slots[states == SlotState.READY]
    reserved = slots[states == SlotState.RESERVED]
    rows, owned = tables.slots[ready], tables.slots[reserved]
    owners = [owned[column].tolist() for column in ("owner_pid", "owner_start", "space")]
    return ArenaContent(
        slot_bytes=tables.slot_bytes.copy(),
        ready=ready,
        keys=np.ascontiguousarray(rows["key"]),
        nbytes=rows["nbytes"].copy(),
        spaces=rows["space"].copy(),
        pinned=rows["pinned"] != 0,
        reserved={
            slot: Owner(pid=pid, start=start, engine=engine)
            for slot, pid, start, engine in zip(reserved.tolist(), *owners, strict=True)
        },
        spoiled=frozenset(reserved[owned["pinned"] != 0].tolist()),
    )


def check_extents(tables: Tables, path: str) -> None:
    """Raise if the table of extents cannot be what a shard wrote.

    Args:
        tables: the arena's tables, mapped writable.
        path: of the arena, for the message.

    Raises:
        ArenaError: an extent has slots of a size that there is not.
    """
    size, geometry = tables.slot_bytes, tables.geometry
    made = (size >= geometry.min_slot_bytes) & (size <= geometry.extent_bytes) & (size % PAGE == 0)
    if not (made | (size == 0)).all():
        raise ArenaError(
            f"The tables of {path} are damaged.",
            next_step="none: the shard starts with a new arena. Look for a process of this user "
            "that writes into it.",
        )


def repair(tables: Tables) -> None:
    """Undo what the predecessor was doing when it died, and rebuild the index."""
    slots = _existing(tables)
    rows = tables.slots[slots]
    sound = (rows["state"] == SlotState.READY) & is_readable(rows["generation"])
    sound &= rows["nbytes"] <= tables.locate(slots)[2]
    # Readers first: they go by the generation.
    tables.slots["generation"][slots[~sound]] |= np.uint64(1)
    free = slots[~sound & (rows["state"] != SlotState.RESERVED)]
    tables.slots["state"][free] = SlotState.FREE

    ready = slots[sound]
    keys = np.ascontiguousarray(rows["key"][sound])
    tables.index.clear()
    tables.index.insert(keys, ready)
    # Of two slots with one key the index knows one; the other would never be evicted.
    twice = ready[tables.index.lookup(keys) != ready]
    tables.slots["generation"][twice] += np.uint64(1)
    tables.slots["state"][twice] = SlotState.FREE


def _existing(tables: Tables) -> SlotArray:
    """Slots of all assigned extents."""
    size = tables.slot_bytes
    parts = [tables.geometry.slots_of(int(e), int(size[e])) for e in np.flatnonzero(size)]
    return np.concatenate([np.empty(0, np.int64), *parts])
