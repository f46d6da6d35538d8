"""KV caches as vLLM makes them: strided views of one allocation, in every KVCacheLayout."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from lmkv_ray.layout import ChunkLayout, PageView, derive_layout

LAYOUTS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]


@dataclass(frozen=True)
class Shape:
    """One KV group: an order of dimensions, their sizes, and bytes of padding.

    ``padding[i]`` bytes follow each step of the i-th dimension of ``name`` (pages padded to a
    common size, for instance); they belong to nobody.
    """

    name: str
    sizes: dict[str, int]
    itemsize: int
    padding: tuple[int, int, int, int, int]

    def strides(self) -> dict[str, int]:
        """Bytes from one index of a dimension to the next."""
        stride, strides = self.itemsize, {}
        for name, padding in zip(reversed(self.name), reversed(self.padding), strict=True):
            strides[name] = stride = stride + padding
            stride *= self.sizes[name]
        return strides

    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last one."""
        strides = self.strides()
        return sum((self.sizes[d] - 1) * strides[d] for d in self.name) + self.itemsize

    def chunk_layout(self, blocks: int) -> ChunkLayout:
        """What lmkv_ray derives from the views."""
        strides = self.strides()
        views = [
            PageView(
                layer=f"layer.{layer}",
                shape=tuple(self.sizes[d] for d in "BHNC"),
                strides=tuple(strides[d] for d in "BHNC"),
                itemsize=self.itemsize,
                offset=layer * strides["L"],
            )
            for layer in range(self.sizes["L"])
        ]
        return derive_layout(views, num_blocks=self.sizes["B"], blocks=blocks)

    def view(self, memory: npt.NDArray[np.uint8]) -> torch.Tensor:
        """[L, B, H, N, C, itemsize] of the engine's memory: the reference's way to see it."""
        strides = self.strides()
        return torch.as_strided(
            torch.from_numpy(memory),
            (*(self.sizes[d] for d in "LBHNC"), self.itemsize),
            (*(strides[d] for d in "LBHNC"), 1),
        )

    def block_bytes(self) -> int:
        """Bytes of one block over all layers, without padding."""
        return prod(self.sizes[d] for d in "LHNC") * self.itemsize


def guarded(nbytes: int, shift: int, seed: int, guard: int = 256) -> npt.NDArray[np.uint8]:
    """Random bytes with the middle ``nbytes`` at ``shift`` past a multiple of 16."""
    raw = np.random.default_rng(seed).integers(0, 256, nbytes + 2 * guard + 32, np.uint8)
    begin = -raw.ctypes.data % 16
    return raw[begin + shift : begin + shift + nbytes + 2 * guard]
