"""What changed in a shard since it last told the directory."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lmkv_ray.messages import Delta


class DeltaLog:
    """Numbers and batches the changes of one shard; bounded.

    A delta that is lost needs no care: its number is missing, the directory notices with the next
    one and asks for a resync. More changes than ``limit`` between two deltas also end in a
    snapshot, so the log never outgrows the shard.

    Args:
        node_id: the shard's node.
        epoch: this life of the shard.
        limit: pending changes above which a snapshot is sent instead.
    """

    def __init__(self, node_id: str, epoch: int, limit: int = 1 << 16) -> None:
        self._node_id = node_id
        self._epoch = epoch
        self._limit = limit
        self._seq = 0
        self._pending: dict[bytes, bool] = {}  # key -> added (True) or removed
        self._snapshot = True  # a new life starts with its whole content

    def __bool__(self) -> bool:
        """Whether there is something to tell."""
        return self._snapshot or bool(self._pending)

    def added(self, keys: Iterable[bytes]) -> None:
        self._note(keys, True)

    def removed(self, keys: Iterable[bytes]) -> None:
        self._note(keys, False)

    def resync(self) -> None:
        """The directory asked for the whole content."""
        self._snapshot = True
        self._pending.clear()

    def take(self, content: Collection[bytes]) -> Delta:
        """The next delta (an empty one is a heartbeat); ``content`` is all ready keys now."""
        self._seq += 1
        snapshot, pending = self._snapshot, self._pending
        self._snapshot, self._pending = False, {}
        return Delta(
            node_id=self._node_id,
            epoch=self._epoch,
            seq=self._seq,
            added=b"".join(content if snapshot else (k for k, new in pending.items() if new)),
            removed=b"" if snapshot else b"".join(k for k, new in pending.items() if not new),
            snapshot=snapshot,
        )

    def _note(self, keys: Iterable[bytes], added: bool) -> None:
        if self._snapshot:
            return
        for key in keys:
            self._pending[key] = added
        if len(self._pending) > self._limit:
            self.resync()
