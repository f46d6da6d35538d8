"""Jobs of every kind for hypothesis, and what they should do, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.transfer.base import Bytes, Ints

NUM_BLOCKS = 24
SLOTS = 8


@dataclass(frozen=True)
class Case:
    """A job on a small engine. ``order``: where slots lie in the arena."""

    layout: ChunkLayout
    slot_bytes: int
    order: Ints
    slots: Ints
    blocks: Ints
    skip: int
    ring_slot_bytes: int
    direct_bytes: int

    @property
    def cache_bytes(self) -> int:
        return max(r.offset + (NUM_BLOCKS - 1) * r.stride + r.nbytes for r in self.layout.runs)

    @property
    def chunks(self) -> Ints:
        """Byte offsets of the job's chunks."""
        offsets: Ints = self.order[self.slots] * self.slot_bytes
        return offsets

    def pairs(self) -> list[tuple[int, int, int]]:
        """(offset in the arena, offset in the cache, bytes) of every page."""
        found = []
        order = np.arange(self.skip, self.skip + len(self.blocks))
        per_chunk = self.layout.blocks
        for i, block in zip(order.tolist(), self.blocks.tolist(), strict=True):
            chunk, index = int(self.chunks[i // per_chunk]), i % per_chunk
            for run, start in zip(self.layout.runs, self.layout.run_offsets(), strict=True):
                in_arena = chunk + start + index * run.nbytes
                found.append((in_arena, run.offset + block * run.stride, run.nbytes))
        return found

    def saved(self, arena: Bytes, cache: Bytes) -> Bytes:
        """The arena after a save."""
        arena = arena.copy()
        for a, c, n in self.pairs():
            arena[a : a + n] = cache[c : c + n]
        return arena

    def loaded(self, arena: Bytes, cache: Bytes) -> Bytes:
        """The cache after a load."""
        cache = cache.copy()
        for a, c, n in self.pairs():
            cache[c : c + n] = arena[a : a + n]
        return cache


@st.composite
def cases(draw: st.DrawFn, *, whole: bool = False) -> Case:
    """A load, or with ``whole`` a job of whole chunks, as saves are."""
    nbytes = draw(st.lists(st.sampled_from([8, 24, 32]), min_size=1, max_size=3))
    if draw(st.booleans()):  # a run per layer, padded or not
        pad = draw(st.sampled_from([0, 0, 8]))
        starts = np.cumsum([0, *((n + pad) * NUM_BLOCKS for n in nbytes)])
        runs = [Run(int(s), n + pad, n) for s, n in zip(starts, nbytes, strict=False)]
    else:  # all layers of a block side by side
        stride = sum(nbytes) + draw(st.sampled_from([0, 8]))
        starts = np.cumsum([0, *nbytes])
        runs = [Run(int(s), stride, n) for s, n in zip(starts, nbytes, strict=False)]
        if draw(st.booleans()):
            runs = [Run(0, stride, sum(nbytes))]
    per_chunk = draw(st.integers(1, 4))
    layout = ChunkLayout(tuple(runs), per_chunk, NUM_BLOCKS)
    order, slots = draw(st.permutations(range(SLOTS))), list(range(SLOTS))
    if draw(st.booleans()):
        order, slots = sorted(order), draw(st.permutations(slots))
    blocks = draw(st.permutations(range(NUM_BLOCKS)))
    if draw(st.booleans()):
        blocks = sorted(blocks, reverse=draw(st.booleans()))
    if whole:
        chunks, skip = draw(st.integers(1, min(SLOTS, NUM_BLOCKS // per_chunk))), 0
        count = chunks * per_chunk
    else:
        skip = draw(st.integers(0, per_chunk - 1))
        count = draw(st.integers(1, min(NUM_BLOCKS, SLOTS * per_chunk - skip)))
        chunks = -(-(count + skip) // per_chunk)
    return Case(
        layout=layout,
        slot_bytes=layout.chunk_bytes + draw(st.sampled_from([0, 16])),
        order=np.array(order),
        slots=np.array(slots[:chunks]),
        blocks=np.array(blocks[:count]),
        skip=skip,
        ring_slot_bytes=draw(st.sampled_from([0, 32, 64, 128, 600, 1024])),
        direct_bytes=draw(st.sampled_from([0, 33, 50, 1 << 20])),
    )


def random_bytes(seed: int, nbytes: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
