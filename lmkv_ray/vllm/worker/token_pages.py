"""Tokens in the pages of a CPU engine, whatever order its attention kernel packs them in.

The kernel that writes the cache (``do_kv_cache_update``) is asked once, with numbers that it can
store exactly, where it puts which element of a block. From then on stored pages are read by that
table, and tokens are written by the kernel itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lmkv_ray.anywhere.rope import Rope, rope_of
from lmkv_ray.errors import UnsupportedError
from lmkv_ray.layout import ChunkLayout
from lmkv_ray.transfer.base import Bytes, Ints
from lmkv_ray.transfer.moves import MovedPiece

DIGIT = 128
"""Numbers below it are exact in every type of a cache, bfloat16 too."""


class CpuTokenPages:
    """See ``transfer.moves.TokenPages``.

    Args:
        layers: vLLM's attention layers, in the order of the layout's runs.
        caches: the pages of each, [blocks, heads, tokens, 2 * head size].
        layout: how a chunk's bytes map to pages.
        rope: how keys are rotated.

    Raises:
        UnsupportedError: the pages are not what was expected, or cannot be read back.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        caches: Sequence[torch.Tensor],
        layout: ChunkLayout,
        rope: Rope,
    ) -> None:
        if len(layers) != len(layout.runs):
            raise _refused(f"{len(layers)} layers are {len(layout.runs)} pieces of a chunk")
        self._layers, self._caches, self._layout, self._rope = layers, caches, layout, rope
        self._runs = list(zip(layout.runs, layout.run_offsets(), strict=True))
        self._tables: list[_Table] = []
        for layer, cache, run in zip(layers, caches, layout.runs, strict=True):
            same = next((t for t in self._tables if t.is_of(layer, cache)), None)
            table = same or _Table(layer, cache)
            if table.elements * cache.element_size() != run.nbytes:
                raise _refused(f"a page of {table.elements} elements has {run.nbytes} bytes")
            self._tables.append(table)
        self._check()

    @property
    def chunk_bytes(self) -> int:
        """See ``TokenPages``."""
        return self._layout.chunk_bytes

    @torch.inference_mode()
    def put(self, arena: Bytes, at: Ints, piece: MovedPiece, blocks: Ints) -> None:
        """See ``TokenPages``."""
        size, per_chunk = self._tables[0].tokens, self._layout.blocks
        if not 0 <= piece.lead <= len(at) * per_chunk * size - piece.n:
            raise IndexError(f"{piece.n} tokens after {piece.lead} of {len(at)} chunks")
        if at.min() < 0 or at.max() + self._layout.chunk_bytes > len(arena):
            raise IndexError(f"chunk at {at.max()} of an arena of {len(arena)} bytes")
        tokens = np.arange(piece.dst, piece.dst + piece.n)
        mine = blocks[tokens // size]
        if mine.min() < 0 or mine.max() >= self._layout.num_blocks:
            raise IndexError(f"block ids {mine.min()}..{mine.max()} of {self._layout.num_blocks}")
        slots = torch.from_numpy(mine * size + tokens % size)
        turn = self._turn(piece.delta)
        for layer, cache, table, (run, begin) in zip(
            self._layers, self._caches, self._tables, self._runs, strict=True
        ):
            nbytes = run.nbytes * per_chunk
            packed = np.concatenate([arena[a + begin : a + begin + nbytes] for a in at.tolist()])
            pages = torch.from_numpy(packed).view(cache.dtype).view(-1, table.elements)
            key, value = table.read(pages)
            part = slice(piece.lead, piece.lead + piece.n)
            key = key[part]
            if turn is not None:
                key = turned(key, *turn, dim=self._rope.dim, halves=self._rope.halves)
            layer.impl.do_kv_cache_update(
                layer, key.contiguous(), value[part].contiguous(), cache, slots
            )

    def _turn(self, delta: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """None: not at all, so that text at its own position keeps its bits."""
        if delta == 0:
            return None
        cos, sin = self._rope.turn(delta)
        return torch.from_numpy(cos), torch.from_numpy(sin)

    def _check(self) -> None:
        """Random tokens that the kernel writes are those that the table reads."""
        for layer, cache, table in zip(self._layers, self._caches, self._tables, strict=True):
            scratch = torch.zeros_like(cache[:1])
            shape = (table.tokens, cache.shape[1], table.head_size)
            key, value = (torch.randn(shape).to(cache.dtype) for _ in range(2))
            layer.impl.do_kv_cache_update(layer, key, value, scratch, torch.arange(table.tokens))
            read = table.read(scratch.view(1, -1))
            if not (torch.equal(read[0], key) and torch.equal(read[1], value)):
                raise _refused("tokens were not read back as they were written")


class _Table:
    """Where each element of a block's keys and values lies in its page."""

    def __init__(self, layer: Any, cache: torch.Tensor) -> None:
        _, self._heads, self.tokens, width = cache.shape
        self.head_size = width // 2
        self.elements = self._heads * self.tokens * width
        self._isa, self._dtype = getattr(layer, "isa", None), cache.dtype
        half = self.elements // 2
        numbers = torch.arange(self.elements)
        found = torch.zeros(self.elements, dtype=torch.int64)
        for power in range(-(-self.elements.bit_length() // 7)):
            digits = (numbers // DIGIT**power % DIGIT).to(cache.dtype)
            scratch = torch.zeros((1, *cache.shape[1:]), dtype=cache.dtype)
            shape = (self.tokens, self._heads, self.head_size)
            key, value = digits[:half].view(shape), digits[half:].view(shape)
            layer.impl.do_kv_cache_update(layer, key, value, scratch, torch.arange(self.tokens))
            found += scratch.view(-1).to(torch.int64) * DIGIT**power
        if not torch.equal(found.sort().values, numbers):
            raise _refused("an attention kernel does not keep each element of a block once")
        positions = torch.empty_like(found)
        positions[found] = numbers
        self._keys, self._values = positions[:half], positions[half:]

    def is_of(self, layer: Any, cache: torch.Tensor) -> bool:
        """Whether another layer's pages are packed alike."""
        mine = (self._isa, self._dtype, self._heads, self.tokens, 2 * self.head_size)
        return mine == (getattr(layer, "isa", None), cache.dtype, *cache.shape[1:])

    def read(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [tokens, heads, head size] each, of pages [n, elements]."""
        shape = (-1, self._heads, self.head_size)
        keys, values = pages.index_select(1, self._keys), pages.index_select(1, self._values)
        return keys.view(shape), values.view(shape)


def turned(
    key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, dim: int, halves: bool
) -> torch.Tensor:
    """Keys turned once more, in float32 with one rounding.

    Args:
        key: [tokens, heads, head size].
        cos: float32[dim / 2].
        sin: float32[dim / 2].
        dim: leading elements that are rotated.
        halves: see ``Rope``.
    """
    whole = key.to(torch.float32)
    if halves:
        x, y = whole[..., : dim // 2], whole[..., dim // 2 : dim]
        pairs = torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1)
    else:
        x, y = whole[..., 0:dim:2], whole[..., 1:dim:2]
        pairs = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1).flatten(-2)
    return torch.cat((pairs, whole[..., dim:]), dim=-1).to(key.dtype)


def check_rope(rope: Rope, module: Any) -> str | None:
    """Whether turning a key is what the model's own module does; what is wrong, else None.

    The same key is rotated at two positions, and the first result turned to the second.
    """
    size, heads = int(module.head_size), 2
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn((1, heads * size), generator=generator)
    known = module.cos_sin_cache.shape[0]
    for first, second in ((3, 50), (known // 2, 7), (1, known - 1)):
        keys = []
        for position in (first, second):
            _, key = module.forward_native(torch.tensor([position]), plain.clone(), plain.clone())
            keys.append(key.view(1, heads, size).float())
        cos, sin = (torch.from_numpy(item) for item in rope.turn(second - first))
        ours = turned(keys[0], cos, sin, dim=rope.dim, halves=rope.halves)
        # The module's own table has the rounding of its type, and of float32 angles.
        if not torch.allclose(ours, keys[1], atol=0.06, rtol=0.06):
            return "keys that were turned are not those that its rotary embedding makes"
    return None


def open_token_pages(
    models: Sequence[torch.nn.Module],
    layers: Mapping[str, Any],
    caches: Mapping[str, torch.Tensor],
    layout: ChunkLayout,
    architectures: Sequence[str],
) -> CpuTokenPages | str:
    """Tokens in a worker's pages, or why they cannot be moved: part of a sentence.

    Args:
        models: that are loaded; not all of this process, which may have several engines.
        layers: vLLM's attention layers, by name.
        caches: the pages of each.
        layout: how a chunk's bytes map to pages.
        architectures: the model's, as its configuration names them.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    every = (module for model in models for module in model.modules())
    modules = list(dict.fromkeys(item for item in every if isinstance(item, RotaryEmbeddingBase)))
    rope = rope_of(modules, architectures)
    if isinstance(rope, str):
        return rope
    if wrong := check_rope(rope, modules[0]):
        return wrong
    try:
        return CpuTokenPages([layers[name] for name in caches], list(caches.values()), layout, rope)
    except (UnsupportedError, AttributeError, KeyError, RuntimeError) as error:
        return str(error)


def _refused(why: str) -> UnsupportedError:
    return UnsupportedError(f"{why}.", next_step="Serve with anywhere: off.")
