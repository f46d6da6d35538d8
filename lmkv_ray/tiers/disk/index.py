"""What is on the disk, and what has to go: no I/O, one thread.

The life of an entry:

    COMING   reserved: its bytes are being written, and are counted from now on
    HERE     published: it is found, may be read, and may be chosen to make room
    GOING    forgotten: no look-up finds it, but its file is there, and is counted until it is gone
             and the last reader has closed it

So what is counted is never less than what is on the medium, whatever is under way. A key has
one entry at most: while it is GOING it cannot be stored again, and no late removal can hit a
newer file.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmkv_ray.policies import Policy
from lmkv_ray.tenants import covers
from lmkv_ray.tiers.format import Label

MAX_CHUNKS = 1 << 20
"""Bounds the index itself: about 500 bytes of memory for each chunk."""


class State(enum.Enum):
    """See the module."""

    COMING = enum.auto()
    HERE = enum.auto()
    GOING = enum.auto()


@dataclass(slots=True, eq=False)
class Entry:
    """One chunk."""

    label: Label
    blocks: int
    """Bytes it takes on the medium."""
    state: State
    readers: int = 0
    pinned: bool = False
    erased: bool = False
    """Its file has no name any more."""


class DiskIndex:
    """Chunks by key, within a budget of bytes.

    Args:
        capacity: bytes on the medium, all entries together.
        policy: empty; orders the entries that may be evicted (HERE, not pinned).
        max_chunks: how many entries there may be.
    """

    def __init__(self, capacity: int, policy: Policy, max_chunks: int = MAX_CHUNKS) -> None:
        self.capacity = capacity
        self.used = 0
        """Bytes that the entries take on the medium."""
        self._policy = policy
        self._max_chunks = max_chunks
        self._entries: dict[bytes, Entry] = {}
        self._here = 0
        self._reading = 0

    def __len__(self) -> int:
        """Chunks that can be found."""
        return self._here

    def get(self, key: bytes) -> Entry | None:
        """The chunk, if it can be found."""
        entry = self._entries.get(key)
        return entry if entry and entry.state is State.HERE else None

    def knows(self, key: bytes) -> bool:
        """Whether there is an entry, in whatever state."""
        return key in self._entries

    def recover(self, label: Label, blocks: int) -> None:
        """A file that was found; call in the order of use, the most recent last."""
        entry = Entry(label, blocks, State.COMING)
        self._entries[label.key] = entry
        self.used += blocks
        self.publish(entry)

    def make_room(self, blocks: int, chunks: int = 1) -> list[Entry] | None:
        """Forget chunks until so many more, of ``blocks`` bytes in all, fit once those are erased.

        None if that cannot be.
        """
        number = len(self._entries) + chunks - self._max_chunks
        return self.evict(self.used + blocks - self.capacity, number)

    def evict(self, nbytes: int, number: int = 0) -> list[Entry] | None:
        """Forget chunks that take so many bytes, at least so many chunks; None: impossible."""
        victims = self._choose(nbytes, number)
        for entry in victims or ():
            self._forget(entry)
        return victims

    def reserve(self, label: Label, blocks: int) -> Entry | None:
        """Count a chunk that is going to be written; None if it does not fit or is known."""
        full = self.used + blocks > self.capacity or len(self._entries) >= self._max_chunks
        if full or label.key in self._entries:
            return None
        entry = self._entries[label.key] = Entry(label, blocks, State.COMING)
        self.used += blocks
        return entry

    def publish(self, entry: Entry) -> bool:
        """The chunk is on the medium; False if it was forgotten meanwhile, and must be erased."""
        if entry.state is not State.COMING:
            return False
        entry.state = State.HERE
        self._here += 1
        self._policy.added(entry.label.key)
        return True

    def forget(self, key: bytes) -> Entry | None:
        """Let no look-up find a chunk any more. Returns what is to be erased now, if anything:
        an entry that is being written is erased by its writer.
        """
        entry = self._entries.get(key)
        if entry is None or entry.state is State.GOING:
            return None
        was_here = entry.state is State.HERE
        self._forget(entry)
        return entry if was_here else None

    def erased(self, entry: Entry) -> None:
        """The entry's file is gone (or never was)."""
        self._forget(entry)
        entry.erased = True
        self._settle(entry)

    def begin_read(self, entry: Entry) -> None:
        """Its file is about to be opened. It will not be chosen to make room."""
        entry.readers += 1
        self._reading += 1

    def end_read(self, entry: Entry) -> None:
        """Its file is closed."""
        entry.readers -= 1
        self._reading -= 1
        self._settle(entry)

    def touched(self, keys: Iterable[bytes]) -> None:
        """Chunks were used; see ``Policy.touched``."""
        self._policy.touched(keys)

    def pin(self, key: bytes, pinned: bool) -> None:
        """Whether a chunk may be chosen to make room; unknown keys are ignored."""
        entry = self.get(key)
        if entry is None or entry.pinned == pinned:
            return
        entry.pinned = pinned
        if pinned:
            self._policy.removed(key)
        else:
            self._policy.added(key)

    def keys(self, space: int | None = None, *, pinned: bool = False) -> list[bytes]:
        """Keys of all entries (of one space; only pinned ones), in whatever state."""
        return [
            key
            for key, entry in self._entries.items()
            if covers(space, entry.label.space) and (entry.pinned or not pinned)
        ]

    def going(self) -> list[bytes]:
        """Keys that are forgotten and whose files are still there."""
        return [key for key, entry in self._entries.items() if entry.state is State.GOING]

    def _choose(self, nbytes: int, number: int) -> list[Entry] | None:
        """The best victims that free so many bytes and entries."""
        asked = max(number, 1)
        while nbytes > 0 or number > 0:
            keys = self._policy.victims(asked + self._reading)
            victims = _enough(
                [self._entries[key] for key in keys if not self._entries[key].readers],
                nbytes,
                number,
            )
            if victims is not None:
                return victims
            if len(keys) < asked + self._reading:
                return None
            asked *= 2
        return []

    def _forget(self, entry: Entry) -> None:
        if entry.state is State.HERE:
            self._here -= 1
            self._policy.removed(entry.label.key)
        entry.state = State.GOING

    def _settle(self, entry: Entry) -> None:
        if entry.erased and not entry.readers and self._entries.get(entry.label.key) is entry:
            del self._entries[entry.label.key]
            self.used -= entry.blocks


def _enough(entries: Sequence[Entry], nbytes: int, number: int) -> list[Entry] | None:
    chosen: list[Entry] = []
    for entry in entries:
        if nbytes <= 0 and len(chosen) >= number:
            break
        chosen.append(entry)
        nbytes -= entry.blocks
    return chosen if nbytes <= 0 and len(chosen) >= number else None
