"""What one launch of the page kernels copies: checked here, written as the device reads it.

A kernel trusts its tables, so what it could get wrong is refused on the host, before any launch.
This module needs neither CuPy nor a GPU.

A launch copies whole pages, run by run, between the engine's KV cache and a *buffer* that holds
chunks (a ring in GPU memory, or an arena that the GPU can address). Page (run r, block b) lies in
the cache at ``r.offset + b * r.stride`` and in the buffer at
``chunk + r.chunk_offset + index * r.nbytes``, where ``chunk`` says where the chunk's first byte
lies, or would lie: it may be outside the buffer as long as the copied pages are inside. So a buffer
smaller than a chunk takes some of the chunk's runs or blocks at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmkv_ray.layout import ChunkLayout

RUN = np.dtype([("offset", "<i8"), ("stride", "<i8"), ("chunk_offset", "<i8"), ("nbytes", "<i8")])
"""``Run`` of pages.cu."""

TARGET = np.dtype([("chunk", "<i8"), ("index", "<i4"), ("block", "<i4")])
"""``Target`` of pages.cu: where one block goes."""

WIDEST = 16
"""Bytes of the widest access of one thread."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageLaunch:
    """What one launch copies; made by :meth:`PageTable.write`, which has checked it."""

    targets: int
    first_run: int
    runs: int
    page_bytes: int
    """Of the largest page."""
    alignment: int
    """A power of two, at most 16, that divides every offset and size in both tables."""


@dataclass(frozen=True, slots=True)
class PageAddresses:
    """Where a launch finds things, as the device addresses them."""

    cache: int
    """The engine's allocation; ``ChunkLayout`` offsets count from here."""
    buffer: int
    runs: int
    """A copy of :attr:`PageTable.runs`, 16-byte aligned."""
    targets: int
    """A copy of what :meth:`PageTable.write` wrote for this launch, 16-byte aligned."""


class PageTable:
    """The tables for one KV group of one engine.

    Args:
        layout: of the engine's chunks.
        cache_bytes: size of the engine's allocation.

    Raises:
        IndexError: the layout reaches beyond the allocation.
    """

    def __init__(self, layout: ChunkLayout, *, cache_bytes: int) -> None:
        self._layout = layout
        self._known: dict[range, _RunRange] = {}
        self.runs = np.array(
            [
                (run.offset, run.stride, chunk_offset, run.nbytes)
                for run, chunk_offset in zip(layout.runs, layout.run_offsets(), strict=True)
            ],
            RUN,
        )
        """RUN[len(layout.runs)], to be copied to the device once."""
        last = (layout.num_blocks - 1) * self.runs["stride"]
        low = self.runs["offset"] + np.minimum(last, 0)
        high = self.runs["offset"] + np.maximum(last, 0) + self.runs["nbytes"]
        if layout.num_blocks < 1 or low.min() < 0 or high.max() > cache_bytes:
            raise IndexError(f"pages up to {high.max()} of a cache of {cache_bytes} bytes")

    def write(
        self,
        out: npt.NDArray[np.void],
        chunks: Ints,
        indices: Ints,
        blocks: Ints,
        *,
        buffer_bytes: int,
        runs: range | None = None,
    ) -> PageLaunch:
        """Check a launch and write its targets.

        The caller owns ``out`` (registered memory, for instance), copies it to the device before
        the launch and leaves it alone until that copy is over. Nothing is written on an error.

        Args:
            out: TARGET[>= len(blocks)].
            chunks: int64[n], byte offset of each block's chunk in the buffer.
            indices: int64[n], each block's number inside its chunk.
            blocks: int64[n], the engine's block ids. Scattering to one block twice is a race.
            buffer_bytes: size of the buffer.
            runs: which of the layout's runs, without gaps; default all.

        Raises:
            IndexError: a block, an index, a run or a page lies outside its memory, or ``out`` is
                too short.
        """
        layout = self._layout
        runs = range(len(layout.runs)) if runs is None else runs
        if runs.step != 1 or runs.start < 0 or runs.stop > len(layout.runs):
            raise IndexError(f"runs {runs} of {len(layout.runs)}")
        count = len(blocks)
        if len(out) < count or not len(chunks) == len(indices) == count:
            raise IndexError(
                f"{count} blocks, {len(chunks)} chunks, {len(indices)} indices, room for {len(out)}"
            )
        if not count or not len(runs):
            return PageLaunch(0, runs.start, 0, 0, WIDEST)
        if blocks.min() < 0 or blocks.max() >= layout.num_blocks:
            raise IndexError(f"block ids {blocks.min()}..{blocks.max()} of {layout.num_blocks}")
        if indices.min() < 0 or indices.max() >= layout.blocks:
            raise IndexError(f"blocks {indices.min()}..{indices.max()} of {layout.blocks}")
        if (known := self._known.get(runs)) is None:
            known = self._known[runs] = _RunRange.of(self.runs[runs.start : runs.stop])
        for nbytes, first, last in known.areas:
            starts = chunks + indices * nbytes
            low, high = starts.min() + first, starts.max() + last + nbytes
            if low < 0 or high > buffer_bytes:
                raise IndexError(f"pages at {low}..{high} of a buffer of {buffer_bytes} bytes")
        out["chunk"][:count] = chunks
        out["index"][:count] = indices
        out["block"][:count] = blocks
        bits = int(np.bitwise_or.reduce(chunks)) | known.bits
        return PageLaunch(count, runs.start, len(runs), known.page_bytes, alignment(bits))


@dataclass(frozen=True, slots=True)
class _RunRange:
    """What launches of some of the runs need to know of them; there are few such ranges."""

    areas: list[tuple[int, int, int]]
    """Size of pages, and the first and last chunk offset of runs with it: few, layers are alike."""
    bits: int
    """Every number ORed."""
    page_bytes: int
    """Of the largest page."""

    @classmethod
    def of(cls, runs: npt.NDArray[np.void]) -> _RunRange:
        areas, bits = [], 0
        for nbytes in np.unique(runs["nbytes"]).tolist():
            offsets = runs["chunk_offset"][runs["nbytes"] == nbytes]
            areas.append((nbytes, int(offsets.min()), int(offsets.max())))
        for field in RUN.names or ():
            bits |= int(np.bitwise_or.reduce(runs[field]))
        return cls(areas, bits, int(runs["nbytes"].max()))


def alignment(bits: int) -> int:
    """The largest power of two up to 16 that divides every number ORed into ``bits``."""
    bits |= WIDEST
    return bits & -bits
