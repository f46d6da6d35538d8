"""Chunks of requests that ended before all of them could be saved.

Their blocks are held until they are: for a bounded time, up to a share of the device's blocks,
and only as long as vLLM has enough others. Runs on the engine's thread; never waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.scheduler.requests import TrackedRequest

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

SHARE = 0.75
"""Of the device's blocks, how many may wait."""

PATIENCE_SECONDS = 2.0
"""That chunks wait without one of them being saved: then there are no slots for them."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chunk to be saved."""

    tracked: TrackedRequest
    group: Group
    chunk: int
    """Its number in the request."""
    key: bytes
    blocks: list[int]
    age: int
    """Of the engine's identity when its blocks were computed."""
    adapter: bytes | None
    """What they were computed with."""

    @classmethod
    def of(
        cls, tracked: TrackedRequest, group: Group, chunk: int, key: bytes, blocks: list[int]
    ) -> Wanted:
        """A chunk whose blocks have been computed now."""
        return cls(tracked, group, chunk, key, blocks, tracked.identity.age, tracked.adapter)


class WaitingSaves:
    """The queue, oldest first. It holds the blocks of its chunks.

    Args:
        clock: seconds that pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queue: deque[Wanted] = deque()
        self._keys: set[bytes] = set()
        self._blocks = 0
        self._give_up_at = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    @property
    def hopeless(self) -> bool:
        """Whether they have waited for too long."""
        return bool(self._queue) and self._clock() >= self._give_up_at

    def add(self, wanted: Wanted, pool: BlockPool) -> bool:
        """Let a chunk wait; False: too many blocks do."""
        if self._blocks + len(wanted.blocks) > SHARE * pool.num_gpu_blocks:
            return False
        if not self._queue:
            self._give_up_at = self._clock() + PATIENCE_SECONDS
        pool.touch([pool.blocks[b] for b in wanted.blocks])
        self._queue.append(wanted)
        self._keys.add(wanted.key)
        self._blocks += len(wanted.blocks)
        return True

    def first(self) -> Wanted:
        """The oldest; there is one."""
        return self._queue[0]

    def pop(self, pool: BlockPool) -> Wanted:
        """It waits no longer: it was ordered (and is held for that), or is given up."""
        wanted = self._queue.popleft()
        self._keys.discard(wanted.key)
        self._blocks -= len(wanted.blocks)
        self._give_up_at = self._clock() + PATIENCE_SECONDS
        pool.free_blocks([pool.blocks[b] for b in reversed(wanted.blocks)])
        return wanted
