"""One tier: the shard's own allocator and policy, without bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmkv_ray.hints import Hints
from lmkv_ray.policies import Policy
from lmkv_ray.shard import Allocator
from lmkv_ray.shard.allocator import Evicted


class Store:
    """Chunks of one size in a store that holds so many.

    ``ShardState`` is left out: it adds engines with grants, which hold free slots for moments
    that a trace does not tell of, and costs as much again.

    Args:
        capacity: chunks that fit.
        make_policy: makes the eviction policy of the tier.
    """

    def __init__(self, capacity: int, make_policy: Callable[[], Policy]) -> None:
        self._allocator = Allocator(1, capacity, 1, make_policy)
        self.held = self._allocator.slot_of
        """What is here."""

    def touch(self, keys: Sequence[bytes]) -> None:
        """Chunks were used, the deepest of a prompt first."""
        self._allocator.touch(keys)

    def put(self, keys: Sequence[bytes], hints: Sequence[Hints]) -> tuple[list[bytes], list[bytes]]:
        """Store chunks of one prompt that are not here, head first, as far as they fit.

        Returns:
            those that were stored, and those that were evicted for them.
        """
        taken = self._allocator.take(1, len(keys))
        evicted = [key for step in taken.steps if isinstance(step, Evicted) for key in step.keys]
        stored = list(keys[: len(taken.slots)])
        # As the shard does: head last, so that without a better order the tail goes first.
        for slot, key, hint in zip(
            reversed(taken.slots), reversed(stored), reversed(hints[: len(stored)]), strict=True
        ):
            self._allocator.fill(slot, key, hint)
        return stored, evicted
