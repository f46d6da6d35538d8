"""What changed in a shard since it last told the directory."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lmkv_ray.keys import key_array, parts_of
from lmkv_ray.messages import Delta

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

    def added(self, keys: Collection[bytes]) -> None:
        self._note(keys, True)

    def removed(self, keys: Collection[bytes]) -> None:
        self._note(keys, False)

    def resync(self, part: int | None = None) -> None:
        """A part of the directory (None: all) must be told the whole content."""
        for its in self._parts if part is None else [self._parts[part]]:
            its.start_over()

    def take(self, content: Collection[bytes], part: int = 0) -> Delta:
        """The next delta for a part (an empty one is a heartbeat).

        Args:
            content: all ready keys now.
            part: whom it is for.
        """
        its = self._parts[part]
        its.seq += 1
        begin, changes = its.resync, its.changes
        its.resync, its.changes = False, {}
        if begin:
            whole, n = list(content), self._piece
            its.pieces = [whole[i : i + n] for i in range(0, len(whole), n)][::-1] or [[]]
        added = [key for key, new in changes.items() if new]
        removed = [key for key, new in changes.items() if not new]
        ended = False
        if its.pieces is not None:
            # Keys that went meanwhile are not named, those that came are among the changes.
            piece = [key for key in its.pieces.pop() if key in content]
            added += self._of_part(piece, part)
            ended = not its.pieces
            if ended:
                its.pieces = None
        return Delta(
            node_id=self._node_id,
            epoch=self._epoch,
            seq=its.seq,
            added=b"".join(added),
            removed=b"".join(removed),
            begin=begin,
            end=ended,
        )

    def _note(self, keys: Collection[bytes], added: bool) -> None:
        if len(self._parts) == 1:
            self._parts[0].note(keys, added)
            return
        for part, its in enumerate(self._parts):
            its.note(self._of_part(keys, part), added)

    def _of_part(self, keys: Collection[bytes], part: int) -> Collection[bytes]:
        if len(self._parts) == 1 or not keys:
            return keys
        mine = (parts_of(key_array(keys), self.parts) == part).tolist()
        return [key for key, its in zip(keys, mine, strict=True) if its]


class _Part:
    """What one part of the directory has not been told yet."""

    def __init__(self, limit: int) -> None:
        self.seq = 0
        self.changes: dict[bytes, bool] = {}  # key -> added (True) or removed
        self.resync = True  # a new life starts with its whole content
        self.pieces: list[list[bytes]] | None = None  # of a snapshot under way, the last one first
        self._limit = limit

    def note(self, keys: Iterable[bytes], added: bool) -> None:
        if self.resync:
            return
        for key in keys:
            self.changes[key] = added
        if len(self.changes) > self._limit:
            self.start_over()

    def start_over(self) -> None:
        self.resync = True
        self.pieces = None
        self.changes.clear()
