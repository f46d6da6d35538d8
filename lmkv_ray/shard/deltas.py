"""What changed in a shard since it last told the directory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from lmkv_ray.keys import key_array, parts_of
from lmkv_ray.messages import Delta, DeviceDelta

ARENA = ""
"""Where chunks are that others can have. Elsewhere: on the device of the engine with that id."""
PIECE = 8192
"""Chunks of the whole content that one delta carries: a few milliseconds for the directory."""


class DeltaLog:
    """Numbers and batches the changes of one shard, for each part of the directory; bounded.

    A delta that is lost needs no care: its number is missing, the directory notices with the next
    one and asks for a resync. More changes than ``limit`` between two deltas also end in a
    snapshot, so the log never outgrows the shard.

    Args:
        node_id: the shard's node.
        epoch: this life of the shard.
        parts: into how many the directory is cut, by key.
        limit: pending changes of a part above which a snapshot is sent instead.
        piece: chunks of a snapshot that one delta carries.
    """

    def __init__(
        self,
        node_id: str,
        epoch: int,
        parts: int = 1,
        limit: int = 1 << 16,
        piece: int = PIECE,
    ) -> None:
        self._piece = piece * parts
        self._node_id = node_id
        self._epoch = epoch
        self._parts = [_Part(limit) for _ in range(parts)]

    @property
    def parts(self) -> int:
        """How many parts are told."""
        return len(self._parts)

    def pending(self, part: int) -> bool:
        """Whether there is something to tell this part."""
        its = self._parts[part]
        return its.resync or its.pieces is not None or bool(its.changes)

    def midway(self, part: int) -> bool:
        """Whether this part has been told some pieces of a snapshot, and others are left."""
        return self._parts[part].pieces is not None

    def added(self, keys: Collection[bytes], where: str = ARENA) -> None:
        """Chunks came to the arena, or to the device of an engine."""
        self._note(where, keys, True)

    def removed(self, keys: Collection[bytes], where: str = ARENA) -> None:
        """Chunks went."""
        self._note(where, keys, False)

    def resync(self, part: int | None = None) -> None:
        """A part of the directory (None: all) must be told the whole content."""
        for its in self._parts if part is None else [self._parts[part]]:
            its.start_over()

    def take(
        self,
        content: Collection[bytes],
        part: int = 0,
        devices: Mapping[str, Collection[bytes]] | None = None,
    ) -> Delta:
        """The next delta for a part (an empty one is a heartbeat).

        Args:
            content: all ready keys now.
            part: whom it is for.
            devices: all keys on the devices of engines now.
        """
        its = self._parts[part]
        its.seq += 1
        begin, changes = its.resync, its.changes
        its.resync, its.changes = False, {}
        contents = {ARENA: content, **(devices or {})}
        if begin:
            its.pieces = [*self._pieces(contents)][::-1]
        told = {where: _Told.of(changed) for where, changed in changes.items()}
        ended = False
        if its.pieces is not None:
            # Keys that went meanwhile are not named, those that came are among the changes.
            where, keys = its.pieces.pop()
            piece = [key for key in keys if key in contents.get(where, ())]
            told.setdefault(where, _Told()).added += self._of_part(piece, part)
            ended = not its.pieces
            if ended:
                its.pieces = None
        arena = told.pop(ARENA, _Told())
        return Delta(
            node_id=self._node_id,
            epoch=self._epoch,
            seq=its.seq,
            added=b"".join(arena.added),
            removed=b"".join(arena.removed),
            begin=begin,
            end=ended,
            devices=[
                DeviceDelta(
                    engine_id=where, added=b"".join(its.added), removed=b"".join(its.removed)
                )
                for where, its in told.items()
            ],
        )

    def _pieces(
        self, contents: Mapping[str, Collection[bytes]]
    ) -> Iterator[tuple[str, list[bytes]]]:
        for where, content in contents.items():
            whole = list(content)
            for i in range(0, len(whole) or 1, self._piece):
                yield where, whole[i : i + self._piece]

    def _note(self, where: str, keys: Collection[bytes], added: bool) -> None:
        for part, its in enumerate(self._parts):
            its.note(where, self._of_part(keys, part), added)

    def _of_part(self, keys: Collection[bytes], part: int) -> Collection[bytes]:
        if len(self._parts) == 1 or not keys:
            return keys
        mine = (parts_of(key_array(keys), self.parts) == part).tolist()
        return [key for key, its in zip(keys, mine, strict=True) if its]


@dataclass(slots=True)
class _Told:
    """What one delta says of the arena, or of one device."""

    added: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, changes: Mapping[bytes, bool]) -> _Told:
        return cls(
            [key for key, new in changes.items() if new],
            [key for key, new in changes.items() if not new],
        )


class _Part:
    """What one part of the directory has not been told yet."""

    def __init__(self, limit: int) -> None:
        self.seq = 0
        self.changes: dict[str, dict[bytes, bool]] = {}  # where -> key -> added (True) or removed
        self.resync = True  # a new life starts with its whole content
        # Of a snapshot under way: where, and keys; the last piece first.
        self.pieces: list[tuple[str, list[bytes]]] | None = None
        self._limit = limit

    def note(self, where: str, keys: Collection[bytes], added: bool) -> None:
        if self.resync or not keys:
            return
        self.changes.setdefault(where, {}).update(dict.fromkeys(keys, added))
        if sum(map(len, self.changes.values())) > self._limit:
            self.start_over()

    def start_over(self) -> None:
        self.resync = True
        self.pieces = None
        self.changes.clear()
