"""What changed in a shard since it last told the directory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from lmkv_ray.keys import key_array, parts_of
from lmkv_ray.messages import Delta, DeviceDelta

ARENA = ""
"""Location of chunks in the arena, which other nodes can fetch. Any other location is an engine_id:
the chunks are on the device of that engine, and cannot be fetched."""
PIECE = 8192
"""Chunks of the whole content that one delta carries: a few milliseconds for the directory."""


class DeltaLog:
    """Numbers and batches the changes of one shard, for each part of the directory; bounded.

    A delta that is lost needs no care: its number is missing, the directory notices with the next
    one and asks for a resync. More changes than ``limit`` between two deltas also end in a
    snapshot, so the log never outgrows the shard.

    Args:
        node_id: id of the shard's node, by which the directory knows it.
        epoch: number of this life of the shard; a later life has a higher number.
        parts: number of parts of the directory; each key belongs to one of them.
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
        self._piece, self._limit = piece * parts, limit
        self._node_id = node_id
        self._epoch = epoch
        self._parts = [_Part(limit) for _ in range(parts)]

    @property
    def parts(self) -> int:
        """Number of parts of the directory."""
        return len(self._parts)

    def pending(self, part: int) -> bool:
        """Whether there is something to tell this part."""
        told = self._parts[part]
        return told.resync or told.pieces is not None or bool(told.changes)

    def midway(self, part: int) -> bool:
        """Whether this part has been told some pieces of a snapshot, and others are left."""
        return self._parts[part].pieces is not None

    def added(self, keys: Collection[bytes], location: str = ARENA) -> None:
        """Chunks came to the arena, or to the device of an engine."""
        self._note(location, keys, True)

    def removed(self, keys: Collection[bytes], location: str = ARENA) -> None:
        """Chunks were removed from the arena, or from the device of an engine."""
        self._note(location, keys, False)

    def resync(self, part: int | None = None) -> None:
        """A part of the directory (None: all) must be told the whole content."""
        for restarted in self._parts if part is None else [self._parts[part]]:
            restarted.start_over()

    def take(
        self,
        content: Collection[bytes],
        part: int = 0,
        devices: Mapping[str, Collection[bytes]] | None = None,
    ) -> Delta:
        """The next delta for a part (an empty one is a heartbeat).

        Args:
            content: keys of all chunks that are ready now.
            part: number of the part that receives the delta.
            devices: keys of all chunks on devices now, by engine_id.
        """
        told = self._parts[part]
        told.seq += 1
        begin, changes = told.resync, told.changes
        told.resync, told.changes = False, {}
        contents = {ARENA: content, **(devices or {})}
        if begin:
            told.pieces = [*self._pieces(contents)][::-1]
        news = {location: _News.of(changed) for location, changed in changes.items()}
        ended = False
        if told.pieces is not None:
            # Keys that went meanwhile are not named, those that came are among the changes.
            location, keys = told.pieces.pop()
            piece = [key for key in keys if key in contents.get(location, ())]
            news.setdefault(location, _News()).added += self._of_part(piece, part)
            ended = not told.pieces
            if ended:
                told.pieces = None
        arena = news.pop(ARENA, _News())
        return Delta(
            node_id=self._node_id,
            epoch=self._epoch,
            seq=told.seq,
            added=b"".join(arena.added),
            removed=b"".join(arena.removed),
            begin=begin,
            end=ended,
            devices=[
                DeviceDelta(
                    engine_id=engine_id,
                    added=b"".join(device.added),
                    removed=b"".join(device.removed),
                )
                for engine_id, device in news.items()
            ],
        )

    def validate(self) -> None:
        """Check that pending changes are bounded, for tests and simulations.

        Raises:
            AssertionError: a part has more pending changes than the limit.
        """
        for number, part in enumerate(self._parts):
            pending = sum(map(len, part.changes.values()))
            assert pending <= self._limit, f"{pending} changes wait for part {number}"

    def _pieces(
        self, contents: Mapping[str, Collection[bytes]]
    ) -> Iterator[tuple[str, list[bytes]]]:
        for location, content in contents.items():
            whole = list(content)
            for i in range(0, len(whole) or 1, self._piece):
                yield location, whole[i : i + self._piece]

    def _note(self, location: str, keys: Collection[bytes], added: bool) -> None:
        for number, part in enumerate(self._parts):
            part.note(location, self._of_part(keys, number), added)

    def _of_part(self, keys: Collection[bytes], part: int) -> Collection[bytes]:
        if len(self._parts) == 1 or not keys:
            return keys
        mine = (parts_of(key_array(keys), self.parts) == part).tolist()
        return [key for key, is_mine in zip(keys, mine, strict=True) if is_mine]


@dataclass(slots=True)
class _News:
    """Keys that one delta names for one location."""

    added: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, changes: Mapping[bytes, bool]) -> _News:
        return cls(
            [key for key, new in changes.items() if new],
            [key for key, new in changes.items() if not new],
        )


class _Part:
    """What one part of the directory has not been told yet."""

    def __init__(self, limit: int) -> None:
        self.seq = 0
        self.changes: dict[str, dict[bytes, bool]] = {}  # location -> key -> added, or removed
        self.resync = True  # a new life starts with its whole content
        # What is left of a snapshot: (location, keys), the last piece first.
        self.pieces: list[tuple[str, list[bytes]]] | None = None
        self._limit = limit

    def note(self, location: str, keys: Collection[bytes], added: bool) -> None:
        if self.resync or not keys:
            return
        self.changes.setdefault(location, {}).update(dict.fromkeys(keys, added))
        if sum(map(len, self.changes.values())) > self._limit:
            self.start_over()

    def start_over(self) -> None:
        self.resync = True
        self.pieces = None
        self.changes.clear()
