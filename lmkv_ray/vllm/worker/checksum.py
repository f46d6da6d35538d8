"""Checksums of tensors where they lie: on a GPU at some hundred GB/s, without copying them out.

Each 64-bit word is multiplied with a random number of its position, modulo 2**64; its upper half
once more by itself, as a product's lowest bits hardly depend on what is multiplied with. So equal
sums of different bytes are a matter of chance, one in billions; integers make them equal on every
device. They are no defence against bytes that are chosen to collide.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CPU_WORDS = 1 << 16
"""At a time: what lies between two operations stays in a core's cache."""
GPU_WORDS = 1 << 21
"""At a time: there are not too many operations."""


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that a tensor spans as int64[n]; a view of it wherever that is possible."""
    import torch

    tensor = tensor.detach()
    spanned = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    flat = tensor.as_strided((spanned if tensor.numel() else 0,), (1,)).view(torch.uint8)
    if len(flat) % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8))
    return flat.view(torch.int64)


def parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors in which a tensor keeps its bytes: itself, or those inside a wrapper."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
    elif not tensor.is_meta:
        yield tensor


def checksums(tensor: torch.Tensor) -> torch.Tensor:
    """int64[n] on the tensor's device: sums that all of its bytes change."""
    import torch

    factors = _factors(tensor.device)
    sums = []
    flat = words(tensor)
    for begin in range(0, len(flat), len(factors)):
        piece = flat[begin : begin + len(factors)]
        weights = factors[: len(piece)]
        sums += [_dot(piece, weights), _dot(piece >> 32, weights)]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=tensor.device)


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if one.device.type == "cpu":
        return one.dot(other)  # in one pass; GPUs have none for integers
    return (one * other).sum()


@lru_cache(maxsize=2)
def _factors(device: torch.device) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0x1D)
    low, size = -(1 << 63), CPU_WORDS if device.type == "cpu" else GPU_WORDS
    made = torch.randint(low, -(low + 1), (size,), generator=generator, dtype=torch.int64)
    return made.to(device)
