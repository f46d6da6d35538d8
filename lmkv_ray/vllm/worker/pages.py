"""A worker's pages: how they lie, and a transfer engine that has moved a block of each group."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lmkv_ray.config import Settings
from lmkv_ray.errors import UnsupportedError
from lmkv_ray.layout import ChunkLayout, PageView, derive_layout
from lmkv_ray.transfer import Gpu, Load, Save, ScratchArena, TransferEngine, open_engine
from lmkv_ray.vllm.engine.groups import Group

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

SELF_TEST_SECONDS = 30.0
"""Within which one block must have been copied to a chunk and back."""


@dataclass(frozen=True, slots=True)
class Pages:
    """What ``open_pages`` made."""

    layouts: tuple[ChunkLayout, ...]
    """Per group; empty where this worker has none of its layers."""
    numbers: Mapping[int, int]
    """Of groups that have layers here: their number in the engine, in order."""
    engine: TransferEngine


def open_pages(
    kv_caches: Mapping[str, torch.Tensor],
    cache: KVCacheConfig,
    groups: Sequence[Group],
    *,
    settings: Settings,
    model: str,
) -> Pages:
    """Learn where the pages are, and test it.

    Args:
        kv_caches: of each layer of this worker.
        cache: what vLLM says of them.
        groups: the engine's KV groups, in its order.
        settings: of this engine.
        model: for messages.

    Raises:
        UnsupportedError: there are no pages, their strides are not understood, or the self-test
            failed.
    """
    if not kv_caches:
        raise UnsupportedError(
            f"A worker of {model} has no layers with a KV cache.",
            next_step="Use fewer pipeline stages, or serve without lmkv_ray.",
        )
    storages = [tensor.untyped_storage() for tensor in kv_caches.values()]
    base = min(s.data_ptr() for s in storages)
    end = max(s.data_ptr() + s.nbytes() for s in storages)
    by_group = [
        _distinct({name: t for name, t in kv_caches.items() if name in group.layer_names})
        for group in cache.kv_cache_groups
    ]
    layouts = tuple(
        derive_layout(
            [_view(name, tensor, base) for name, tensor in tensors.items()],
            num_blocks=cache.num_blocks,
            blocks=group.blocks,
        )
        for group, tensors in zip(groups, by_group, strict=True)
    )
    here = [number for number, tensors in enumerate(by_group) if tensors]
    engine = open_engine(
        [layouts[number] for number in here],
        cache=base,
        cache_bytes=end - base,
        settings=settings,
        gpu=_gpu(next(iter(kv_caches.values()))),
    )
    for i, number in enumerate(here):
        if not _survives(engine, [layouts[n] for n in here], i, list(by_group[number].values())):
            engine.close()
            raise UnsupportedError(
                f"Blocks of {model} did not survive a copy to a chunk and back: its KV cache "
                f"layout ({getattr(cache, 'kv_cache_layout', None)}) is not what its strides say.",
                next_step="Set VLLM_KV_CACHE_LAYOUT=LBHNC, or report the attention backend.",
            )
    return Pages(layouts, {number: i for i, number in enumerate(here)}, engine)


def _survives(
    engine: TransferEngine,
    layouts: Sequence[ChunkLayout],
    number: int,
    tensors: Sequence[torch.Tensor],
) -> bool:
    """Save one block, load it into another, and compare through the model's own views."""
    layout = layouts[number]
    if layout.num_blocks < 2:
        return True
    source, target = layout.num_blocks - 1, layout.num_blocks - 2

    def part(tensor: torch.Tensor, block: int) -> torch.Tensor:
        rows = tensor.shape[0] // layout.num_blocks
        return tensor.view(torch.uint8)[block * rows : (block + 1) * rows]

    def blocks(block: int) -> npt.NDArray[np.int64]:
        """A whole chunk of one block, over and over."""
        return np.full(layout.blocks, block)

    for i, tensor in enumerate(tensors):
        block = part(tensor, source)
        block.copy_((torch.arange(block.numel()) % (251 - i % 7)).view(block.shape))
    arena, slots = ScratchArena(layout.chunk_bytes), np.zeros(1, np.int64)
    engine.attach(arena, [0] * len(layouts))
    deadline = time.monotonic() + SELF_TEST_SECONDS
    engine.begin_saves([Save(arena.arena_id, slots, blocks(source), deadline, number)])
    good = _ended_well(engine, deadline)
    generations, one = np.zeros(1, np.uint64), blocks(target)[:1]
    load = Load(arena.arena_id, slots, generations, one, group=number)
    engine.begin_loads([load], idle=True)
    good = _ended_well(engine, deadline) and good
    good = good and all(torch.equal(part(t, source), part(t, target)) for t in tensors)
    for tensor in tensors:
        part(tensor, source).zero_()
        part(tensor, target).zero_()
    return good


def _ended_well(engine: TransferEngine, deadline: float) -> bool:
    """Wait for the one copy under way."""
    while time.monotonic() < deadline:
        for ended in engine.ended():
            return ended.ok
        time.sleep(0.001)
    return False


def _gpu(pages: torch.Tensor) -> Gpu | None:
    """Where these pages are, if on a GPU."""
    if not pages.is_cuda:  # true for AMD's too
        return None
    return Gpu(pages.device.index, lambda: int(torch.cuda.current_stream().cuda_stream))


def _view(name: str, tensor: torch.Tensor, base: int) -> PageView:
    """What a layer's KV cache looks like, in bytes from ``base``."""
    return PageView(
        layer=name,
        shape=tuple(tensor.shape),
        strides=tuple(s * tensor.element_size() for s in tensor.stride()),
        itemsize=tensor.element_size(),
        offset=tensor.data_ptr() - base,
    )


def _distinct(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without layers that use the cache of another one before them."""
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
    return {name: tensors[name] for name in first.values()}
