"""Whether vLLM's own prefix cache holds KV of an earlier age of the engine's identity.

It is vLLM's, or its user's, to empty it when weights change. Until that has happened, what is
computed on top of a hit in it is of no age, and is not saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


class OwnCache:
    """Sees that it was emptied: vLLM makes a new map of its blocks then."""

    def __init__(self) -> None:
        self.pool: BlockPool | None = None
        """vLLM's."""
        self._stale: object = None

    def grow_stale(self) -> None:
        """What it holds now is of an earlier age."""
        if self.pool is not None and len(self.pool.cached_block_hash_to_block):
            self._stale = self.pool.cached_block_hash_to_block

    @property
    def stale(self) -> bool:
        """Whether it holds anything of an earlier age."""
        if self.pool is None or self._stale is not self.pool.cached_block_hash_to_block:
            self._stale = None
        return self._stale is not None
