"""vLLM's own prefix cache: when it was emptied, and whether it holds KV of an earlier age.

It is vLLM's, or its user's, to empty it when weights change. Until that has happened, what is
computed on top of a hit in it is of no age (see ``identity.ages``), and is not saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        self._stale = {name: its for name, its in self._stale.items() if its is now}
        return "" in self._stale or adapter in self._stale
