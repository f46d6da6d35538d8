"""Which block of the engine is which block of which chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmkv_ray.layout import ChunkLayout
from lmkv_ray.transfer.base import Ints


@dataclass(frozen=True, slots=True)
class BlockTargets:
    """Three arrays of equal length, one element a block.

    ``chunks``: byte offset of the chunk in the arena; ``indices``: the block's number inside the
    chunk; ``blocks``: the engine's block id.
    """

    chunks: Ints
    indices: Ints
    blocks: Ints

    def check(self, layout: ChunkLayout, arena_bytes: int) -> None:
        """Refuse what no copy may touch.

        Raises:
            IndexError: a block or a chunk lies outside its memory.
        """
        if not len(self.blocks):
            return
        blocks, chunks, indices = self.blocks, self.chunks, self.indices
        if blocks.min() < 0 or blocks.max() >= layout.num_blocks:
            raise IndexError(f"block ids {blocks.min()}..{blocks.max()} of {layout.num_blocks}")
        if chunks.min() < 0 or chunks.max() + layout.chunk_bytes > arena_bytes:
            raise IndexError(f"chunk at {chunks.max()} of an arena of {arena_bytes} bytes")
        if indices.min() < 0 or indices.max() >= layout.blocks:
            raise IndexError(f"block {indices.max()} of a chunk of {layout.blocks}")


def target_blocks(chunk_offsets: Ints, blocks: Ints, *, skip: int, per_chunk: int) -> BlockTargets:
    """Lay ``blocks`` over chunks of ``per_chunk`` blocks, leaving out the first ``skip`` blocks.

    Raises:
        IndexError: there are more blocks than the chunks hold.
    """
    order = np.arange(skip, skip + len(blocks), dtype=np.int64)
    return BlockTargets(chunk_offsets[order // per_chunk], order % per_chunk, blocks)
