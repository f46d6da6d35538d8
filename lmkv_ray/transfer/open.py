"""Which engine moves the chunks of a worker."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmkv_ray.config import Settings
from lmkv_ray.errors import UnsupportedError
from lmkv_ray.layout import ChunkLayout
from lmkv_ray.transfer.base import TransferEngine
from lmkv_ray.transfer.device import DeviceError
from lmkv_ray.transfer.device_engine import DeviceEngine
from lmkv_ray.transfer.host_engine import HostEngine


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that holds a worker's pages."""

    number: int
    """As torch and CuPy count it."""
    model_stream: Callable[[], int]
    """Address of the stream on which the calling thread queues the model's steps, for instance
    ``lambda: torch.cuda.current_stream().cuda_stream``."""


def open_engine(
    layouts: Sequence[ChunkLayout],
    *,
    cache: int,
    cache_bytes: int,
    settings: Settings,
    gpu: Gpu | None = None,
) -> TransferEngine:
    """An engine for one worker; to be closed.

    Args:
        layouts: one per KV group.
        cache: address of the worker's one allocation of pages, which outlives the engine.
        cache_bytes: its size.
        settings: of this process.
        gpu: where the pages are; None: in the memory of this process.

    Raises:
        UnsupportedError: no CuPy, or the GPU cannot be used.
        IndexError: a layout reaches beyond the allocation.
    """
    if gpu is None:
        memory = (ctypes.c_uint8 * cache_bytes).from_address(cache)
        pages = np.ctypeslib.as_array(memory)
        return HostEngine(layouts, pages, threads=settings.copy_threads)
    from lmkv_ray.transfer.cupy_device import CupyDevice  # CuPy takes a second to import

    device = CupyDevice(gpu.number, gpu.model_stream)
    try:
        return DeviceEngine(
            layouts,
            device,
            cache=cache,
            cache_bytes=cache_bytes,
            ring_bytes=settings.gpu_ring_bytes,
            direct_bytes=settings.direct_copy_bytes,
        )
    except DeviceError as error:
        raise UnsupportedError(
            f"{device.name} has no room for a ring of {settings.gpu_ring_bytes >> 20} MiB: "
            f"{error}.",
            next_step="Lower vLLM's --gpu-memory-utilization a little, or LMKV_GPU_RING_BYTES.",
        ) from error
