"""KV groups: which chunks of which group a hit needs, and how far a prompt can be a hit.

Layers with the same kind of attention share a block table; vLLM calls that a group. All that a
group's layers still look at once ``end`` tokens are computed must be in the cache for a hit of
``end`` tokens: everything for full attention, the last tokens for a sliding window, the rest of the
current piece for chunked local attention. The arithmetic is that of vLLM's own managers
(``get_num_skipped_tokens``): what vLLM would have freed, it does not ask us for either; the table
has null blocks there.

Chunks of a sliding window are no longer than the window, so that those of generated tokens are
whole when they are complete. A failed load fails as a whole, and the request never claims past it
again: half a window cannot be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmkv_ray.config import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

Bools = npt.NDArray[np.bool_]

ACCELERATOR_CHUNK_TOKENS = 256
"""About so many tokens a chunk, unless the settings say otherwise."""


@dataclass(frozen=True, slots=True)
class Group:
    """One group, and how its blocks are cut into chunks."""

    number: int
    """Its position in the engine's order, and part of its chunks' keys."""
    block_tokens: int
    blocks: int
    """Blocks in a chunk."""
    hash_tokens: int
    """Tokens between two of the engine's block hashes; divides ``block_tokens``."""
    window: int | None = None
    """Sliding window: the tokens that the next token's layers look at, itself among them."""
    local: int | None = None
    """Chunked local attention: layers look back to the last multiple of this many tokens."""

    @property
    def tokens(self) -> int:
        """Tokens in a chunk."""
        return self.blocks * self.block_tokens

    @property
    def full(self) -> bool:
        """Whether every block of a request stays needed."""
        return self.window is None and self.local is None

    def hash_index(self, chunk: int) -> int:
        """Which of the engine's hashes is that of a chunk's last block."""
        return (chunk + 1) * self.tokens // self.hash_tokens - 1

    def first_block(self, computed: int, end: int) -> int:
        """The first block that a hit of ``end`` tokens needs beyond ``computed`` local ones."""
        return int(max(self._unneeded(end), computed)) // self.block_tokens

    def span(self, computed: int, end: int) -> range:
        """Chunks that hold the blocks from ``first_block`` to ``end``."""
        first, last = self.first_block(computed, end), end // self.block_tokens
        return range(first // self.blocks, -(-last // self.blocks) if last > first else 0)

    def gaps(self, ends: npt.NDArray[np.int64], computed: int, first: int, found: Bools) -> Bools:
        """bool[n]: for which of the hit lengths ``ends`` a needed chunk is missing.

        Args:
            ends: hit lengths in tokens, multiples of ``block_tokens``.
            computed: tokens that the engine has itself.
            first: number of the chunk that ``found[0]`` is about.
            found: whether a chunk is in the cache; up to the longest of ``ends``.
        """
        missing = np.concatenate([[0], np.cumsum(~found)])
        begins = np.maximum(self._unneeded(ends), computed) // self.block_tokens
        lasts = ends // self.block_tokens
        upto = missing[-(-lasts // self.blocks) - first]
        before = missing[np.minimum(begins // self.blocks - first, len(found))]
        gap: Bools = (upto > before) & (begins < lasts)
        return gap

    def _unneeded(self, computed: Any) -> Any:
        """Leading tokens that vLLM does not look at once ``computed`` are there (an int, or an
        array).
        """
        if self.window is not None:
            skipped = computed - self.window + 1
            return skipped * (skipped > 0)
        if self.local is not None:
            return computed // self.local * self.local
        return computed * 0


def longest_hit(
    groups: Sequence[Group],
    found: Sequence[Bools],
    *,
    computed: int,
    limit: int,
    align: int,
) -> int:
    """The longest prefix, in tokens, for which every group has what it needs.

    Args:
        groups: all of the engine's.
        found: for each group, which of its chunks from ``computed // group.tokens`` up to the one
            that holds token ``limit - 1`` are in the cache.
        computed: tokens that the engine has itself, a multiple of ``align``.
        limit: no hit is longer.
        align: every hit is a multiple of this many tokens.

    Returns:
        ``computed`` if there is no hit beyond it.
    """
    end = limit
    for group, held in zip(groups, found, strict=True):
        if group.full and not held.all():
            end = min(end, (computed // group.tokens + int(np.argmin(held))) * group.tokens)
    end -= end % align
    windowed = [(g, held) for g, held in zip(groups, found, strict=True) if not g.full]
    if end <= computed or not windowed:
        return max(end, computed)
    ends = np.arange(end, computed, -align, dtype=np.int64)
    gap = np.zeros(len(ends), np.bool_)
    for group, held in windowed:
        gap |= group.gaps(ends, computed, computed // group.tokens, held)
    return computed if gap.all() else int(ends[np.argmin(gap)])


def chunk_tokens(config: VllmConfig, settings: Settings) -> int:
    """Tokens in one chunk, before rounding to whole blocks of a group.

    On a CPU the default is one block: recomputing a chunk's tail costs milliseconds a token there,
    copying in smaller pieces costs microseconds.
    """
    if settings.chunk_tokens is not None:
        return settings.chunk_tokens
    return 1 if config.device_config.device_type == "cpu" else ACCELERATOR_CHUNK_TOKENS


def derive_groups(config: KVCacheConfig, chunk_tokens: int) -> tuple[Group, ...]:
    """The engine's groups, with chunks of about ``chunk_tokens``, at least one block.

    A chunk is saved when it is complete, so it is no longer than what the engine then still holds:
    the window. Of chunked local attention whole chunks make up a piece.
    """
    groups = []
    for number, group in enumerate(config.kv_cache_groups):
        spec: Any = group.kv_cache_spec
        spec = next(iter(getattr(spec, "kv_cache_specs", {"": spec}).values()))
        size = spec.block_size
        blocks = -(-chunk_tokens // size)
        window = local = None
        if type(spec).__name__ == "SlidingWindowSpec":
            window = spec.sliding_window + getattr(spec, "extra_retained_tokens", 0)
            blocks = max(1, min(blocks, (window - 1) // size))
        elif type(spec).__name__ == "ChunkedLocalAttentionSpec":
            local = spec.attention_chunk_size
            blocks = math.gcd(blocks, local // size) if local % size == 0 else 1
        hash_tokens = getattr(config, "hash_block_size", None) or size
        groups.append(Group(number, size, blocks, hash_tokens, window, local))
    return tuple(groups)


def hit_alignment(groups: Sequence[Group]) -> int:
    """Tokens of which every hit is a multiple, as vLLM wants it: whole blocks of every group."""
    return math.lcm(*(group.block_tokens for group in groups))
