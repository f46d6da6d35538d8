"""How the bytes of one chunk map to the engine's pages.

vLLM gives a connector one strided view per layer, dimension 0 being blocks. Whatever the
KVCacheLayout (LBHNC, LBNHC, LHBNC, BLHNC, ...), the bytes of one block are some number of
contiguous *runs*, each repeated at a fixed stride from block to block. ``derive_layout`` finds
these runs from shapes and strides alone and merges neighbours, so a layout with all layers of a
block side by side ends up as one run, and one with a page per layer as one run per layer.

A chunk is *run-major*: for each run, the bytes of the chunk's blocks one after the other. Copying a
chunk is then one strided two-dimensional copy per run, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product

import msgspec

from lmkv_ray.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class PageView:
    """Shape and strides of one layer's KV cache, as registered by the engine.

    ``offset`` is that of the first element in the engine's allocation; ``offset`` and ``strides``
    are in bytes. ``shape[0]`` counts blocks, or a multiple of them if the attention kernel splits
    a block.
    """

    layer: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    offset: int


class Run(msgspec.Struct, frozen=True, array_like=True):
    """``nbytes`` contiguous bytes of every block: block b's are at ``offset + b * stride``."""

    offset: int
    stride: int
    nbytes: int


class ChunkLayout(msgspec.Struct, frozen=True, array_like=True):
    """The runs of one block of one KV group on one rank, and how many blocks make a chunk."""

    runs: tuple[Run, ...]
    blocks: int
    """Blocks in one chunk."""
    num_blocks: int
    """Blocks in the engine's cache: valid block ids are below it."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(run.nbytes for run in self.runs)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk."""
        return self.block_bytes * self.blocks

    def run_offsets(self) -> list[int]:
        """Where each run's area begins inside a chunk, in bytes."""
        offsets, at = [], 0
        for run in self.runs:
            offsets.append(at)
            at += run.nbytes * self.blocks
        return offsets

    def digest(self) -> str:
        """Equal for engines whose chunks have the same bytes in the same order.

        Neither where the pages lie nor how many blocks the cache has matters for that, only how
        the runs cut a block.
        """
        shape = [[run.nbytes for run in self.runs], self.blocks]
        return blake2b(msgspec.json.encode(shape), digest_size=12).hexdigest()


def derive_layout(views: Sequence[PageView], *, num_blocks: int, blocks: int) -> ChunkLayout:
    """The layout of chunks of ``blocks`` blocks over these layers.

    Args:
        views: one per layer, in the order in which layers lie in a chunk.
        num_blocks: blocks in the engine's cache.
        blocks: blocks in one chunk.

    Raises:
        UnsupportedError: a view does not have a whole multiple of ``num_blocks`` rows, or blocks
            overlap.
    """
    runs: list[Run] = []
    for view in views:
        for run in _runs_of(view, num_blocks):
            last = runs[-1] if runs else None
            if (
                last
                and last.stride == run.stride
                and last.offset + last.nbytes == run.offset
                and last.nbytes + run.nbytes <= run.stride
            ):
                runs[-1] = Run(last.offset, last.stride, last.nbytes + run.nbytes)
            else:
                runs.append(run)
    return ChunkLayout(tuple(runs), blocks, num_blocks)


def _runs_of(view: PageView, num_blocks: int) -> list[Run]:
    rows, *inner = view.shape
    if num_blocks <= 0 or rows % num_blocks or not inner or 0 in view.shape:
        raise _unknown(view, f"its first dimension is no multiple of {num_blocks} blocks")
    split = rows // num_blocks  # the attention kernel's blocks in one of the engine's
    block_stride = view.strides[0] * split
    dims = [(stride, size) for stride, size in zip(view.strides[1:], inner, strict=True)]
    dims = [(stride, size) for stride, size in [(view.strides[0], split), *dims] if size > 1]
    # From the innermost dimension outwards: grow one contiguous piece as far as the strides allow.
    contiguous = span = view.itemsize
    outer: list[tuple[int, int]] = []
    for stride, size in sorted([*dims, (block_stride, num_blocks)]):
        if stride < span and size > 1:
            raise _unknown(view, "its blocks overlap")
        span += stride * (size - 1)
        if (stride, size) == (block_stride, num_blocks):
            continue
        if stride == contiguous and not outer:
            contiguous *= size
        else:
            outer.insert(0, (stride, size))
    starts = (
        sum(i * stride for i, (stride, _) in zip(index, outer, strict=True))
        for index in product(*(range(size) for _, size in outer))
    )
    return [Run(view.offset + start, block_stride, contiguous) for start in starts]


def _unknown(view: PageView, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"The KV cache of layer {view.layer} has shape {view.shape} and strides {view.strides} "
        f"(bytes), which lmkv_ray does not understand: {why}.",
        next_step="Set VLLM_KV_CACHE_LAYOUT=LBHNC, or report the attention backend in use.",
    )
