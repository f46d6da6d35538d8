"""What vLLM's own prefix cache holds: the tier above the arena, which only this engine can use.

The engine's thread notes chunks as they are computed, loaded or hit. Everything else runs on the
link's thread, between two messages: it looks a chunk's last block up in vLLM's block pool (vLLM
frees tails first, so it goes first) and tells the shard what came and went. Looking is all it does
there: one read of a dictionary, which Python does not tear. So a step costs next to nothing, and
an engine that is idle when its cache is reset is noticed all the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lmkv_ray.keys import key_array, key_list
from lmkv_ray.vllm.link.watch_list import Watched

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

MAX_WATCHED = 1 << 16
"""Chunks that are known to be on the device."""
MAX_NOTED = 1024
"""Runs of chunks that wait to be looked at for the first time; the oldest are forgotten."""
CHECK_SECONDS = 0.5
CHECKED = 512
"""Chunks that are looked at again at a time; less than a millisecond."""


class BlockRun(NamedTuple):
    """Chunks of one group that were on the device a moment ago."""

    group: int
    keys: bytes
    last_blocks: Sequence[bytes]
    """Hashes of their last blocks."""


class DeviceWatch:
    """Follows which chunks are on the device."""

    def __init__(self) -> None:
        self.pool: BlockPool | None = None
        """vLLM's; nothing is known without it."""
        self._noted: deque[BlockRun] = deque(maxlen=MAX_NOTED)
        self._watched: Watched[tuple[bytes, int]] = Watched(MAX_WATCHED)
        self._checked_at = 0.0
        self._untold = self._renamed = False

    # -- the engine's thread --------------------------------------------------------------------

    def note(self, runs: Iterable[BlockRun]) -> None:
        """Chunks of a request have come to the device."""
        self._noted.extend(runs)

    def rename(self) -> None:
        """Keys are made anew: those known so far name nothing any more."""
        self._renamed = True
        self._noted.clear()

    # -- the link's thread ----------------------------------------------------------------------

    def start_over(self) -> None:
        """The shard has restarted: the next news lists every key again."""
        if self._renamed:
            self._renamed = False
            self._watched = Watched(MAX_WATCHED)
        self._untold = True

    def news(self) -> tuple[bytes, bytes]:
        """Keys of chunks that came to the device since the last call, and of those that went.

        What is used again is told again: if it was forgotten meanwhile, it is known from then on.
        """
        if self.pool is None:
            return b"", b""
        added = [*self._watched] if self._untold else []
        self._untold = False
        while self._noted:
            run = self._noted.popleft()
            for key, block in zip(key_list(key_array(run.keys)), run.last_blocks, strict=True):
                if is_on_device(self.pool, block, run.group):
                    self._watched.add(key, (block, run.group))
                    added.append(key)
        removed = [*self._watched.excess(), *self._gone(self.pool)]
        for key in removed:
            self._watched.pop(key)
        return b"".join(added), b"".join(removed)

    def _gone(self, pool: BlockPool) -> list[bytes]:
        """Some chunks that are not on the device any more."""
        now = time.monotonic()
        if now < self._checked_at + CHECK_SECONDS:
            return []
        self._checked_at = now
        gone: list[bytes] = []
        looked = 0
        while looked < len(self._watched):
            turn = self._watched.turn(CHECKED)
            lost = [key for key, (block, group) in turn if not is_on_device(pool, block, group)]
            gone += lost
            looked += len(turn)
            if len(lost) < len(turn):
                break  # else it was reset, and all of it is gone
        return gone


def is_on_device(pool: BlockPool, block: bytes, group: int) -> bool:
    """Whether vLLM's prefix cache has a block. Any thread may ask."""
    try:
        return pool.get_cached_block(block, [group]) is not None
    except (RuntimeError, StopIteration):
        return True  # there were several, and one of them went while we looked
