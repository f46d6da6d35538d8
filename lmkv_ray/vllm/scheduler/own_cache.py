"""vLLM's own prefix cache: what it has of a prompt, when it was emptied, and whether it holds KV of
an earlier age.

It is vLLM's, or its user's, to empty it when weights change. Until that has happened, what is
computed on top of a hit in it is of no age (see ``identity.ages``), and is not saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.link.device_watch import is_on_device

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


class OwnCache:
    """Follows vLLM's map of its cached blocks: to empty it, vLLM makes a new one."""

    def __init__(self) -> None:
        self._pool: BlockPool | None = None
        self._seen: object = None
        self._stale: dict[str, object] = {}

    def bind(self, pool: BlockPool) -> None:
        """Give access to vLLM's block pool."""
        self._pool, self._seen = pool, pool.cached_block_hash_to_block

    def emptied(self) -> bool:
        """Whether it was emptied since this was last asked."""
        if self._pool is None or self._pool.cached_block_hash_to_block is self._seen:
            return False
        self._seen = self._pool.cached_block_hash_to_block
        return True

    def grow_stale(self, adapter: str = "") -> None:
        """What it holds now is of an earlier age, or of what an adapter of this name was before."""
        if self._pool is not None and len(self._pool.cached_block_hash_to_block):
            self._stale[adapter] = self._pool.cached_block_hash_to_block

    def stale(self, adapter: str = "") -> bool:
        """Whether it holds anything of an earlier age, or of an earlier adapter of this name."""
        if self._pool is None:
            return False
        now = self._pool.cached_block_hash_to_block
        self._stale = {name: stale for name, stale in self._stale.items() if stale is now}
        return "" in self._stale or adapter in self._stale


def device_prefix(
    pool: BlockPool | None,
    groups: Sequence[Group],
    hashes: Sequence[bytes],
    *,
    limit: int,
    align: int,
) -> int:
    """Tokens of a prompt that are on the device, about as vLLM will find them.

    Args:
        pool: vLLM's.
        groups: the engine's KV groups, in its order.
        hashes: the prompt's.
        limit: no more than so many tokens; a multiple of ``align``.
        align: whole blocks of every group.
    """
    if pool is None:
        return 0

    def reaches(end: int) -> bool:
        return all(
            is_on_device(pool, hashes[end // group.hash_tokens - 1], group.number)
            for group in groups
        )

    # What is there is a prefix, or nearly so: look for its end by halves.
    there, missing = 0, limit // align + 1
    if limit and reaches(limit):
        return limit
    while missing - there > 1:
        middle = (there + missing) // 2
        if reaches(middle * align):
            there = middle
        else:
            missing = middle
    return there * align
