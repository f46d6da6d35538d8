"""More than one copy of what many engines ask for, or what a user pinned."""

from __future__ import annotations

from collections import Counter

from lmkv_ray.keys import KEY_BYTES, key_array, key_list
from lmkv_ray.node.handover import Handover
from lmkv_ray.node.shard import Shard

PERIOD_SECONDS = 10.0
HOT_HITS = 2
"""Hits within one period that make a chunk hot."""
MAX_COUNTED = 1 << 16
"""Chunks whose hits are counted in one period."""


class Replication:
    """Sees to it that hot and pinned chunks have copies on several nodes.

    Args:
        shard: the chunks in the memory of this node.
        handover: makes copies.
        replicas: copies of such a chunk that there should be, with the one here.
    """

    def __init__(self, shard: Shard, handover: Handover, replicas: int) -> None:
        self._shard = shard
        self._handover = handover
        self._replicas = replicas
        self._hits: Counter[bytes] = Counter()

    def touched(self, keys: bytes) -> None:
        """Chunks were hit; 16 bytes each."""
        if self._replicas > 1 and len(self._hits) < MAX_COUNTED:
            whole = len(keys) // KEY_BYTES * KEY_BYTES
            self._hits.update(key_list(key_array(keys[:whole])))

    async def step(self) -> None:
        """Ask other nodes to fetch what is pinned, and what was hot since the last time."""
        if self._replicas == 1:
            return
        hits, self._hits = self._hits, Counter()
        keys = dict.fromkeys(self._shard.state.chunks.pinned())
        keys |= dict.fromkeys(key for key, n in hits.most_common() if n >= HOT_HITS)
        deadline = self._shard.clock.monotonic() + PERIOD_SECONDS
        await self._handover.spread([*keys], self._replicas - 1, deadline, shared=True)
