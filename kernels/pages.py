"""Launches of pages.cu: gather pages into a buffer of chunks, scatter them back.

The launches are asynchronous: they are queued on a stream and return. The caller that queues them
keeps both tables and both memories alive, and the targets' table on the device unchanged, until the
stream has passed the launch.

How many thread blocks. A thread keeps four accesses of up to 16 bytes in flight, a thread block of
256 threads 16 KiB. By Little's law a rate needs ``bytes per second read * latency / 16 KiB`` thread
blocks; loaded HBM is taken to answer in a microsecond. For 1.25 TB/s read and as much written that
is 76; for four times a PCIe 5 link, 220 GB/s, 13. So ``BESIDE_A_MODEL`` is 16, an eighth of an
H100's 132 multiprocessors, and None stands for two thread blocks on each multiprocessor.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import numpy as np

from lmkv_ray.errors import UnsupportedError
from lmkv_ray.kernels.page_table import RUN, PageAddresses, PageLaunch, alignment

THREADS = 256
"""Threads in one thread block: ``THREADS`` of pages.cu."""

LANES = 32
"""Threads that share a tile: ``LANES`` of pages.cu."""

UNROLL = 4
"""Accesses a thread has in flight: ``UNROLL`` of pages.cu."""

BESIDE_A_MODEL = 16
"""Thread blocks that outrun a PCIe 5 link and leave the other multiprocessors to the model."""

OPTIONS = ("-std=c++14",)
"""Of the run-time compiler."""


def gather(
    launch: PageLaunch, at: PageAddresses, *, stream: int, grid_limit: int | None = BESIDE_A_MODEL
) -> None:
    """Queue the copy of a launch's pages from the cache into the buffer.

    Args:
        launch: from :meth:`PageTable.write`; it has been checked.
        at: device addresses.
        stream: address of a CUDA or HIP stream of the current device; 0 is the default stream.
        grid_limit: thread blocks at most; None is as many as the device runs well.

    Raises:
        UnsupportedError: no CuPy, or no device it can use.
    """
    _queue("gather", launch, at, stream, grid_limit)


def scatter(
    launch: PageLaunch, at: PageAddresses, *, stream: int, grid_limit: int | None = BESIDE_A_MODEL
) -> None:
    """Queue the copy of a launch's pages from the buffer into the cache; as :func:`gather`."""
    _queue("scatter", launch, at, stream, grid_limit)


def prepare() -> None:
    """Compile the kernels for the current device (a second; CuPy caches it on disk).

    Raises:
        UnsupportedError: no CuPy, or no device it can use.
    """
    device = current_device()
    for direction in ("gather", "scatter"):
        for word in (1, 2, 4, 8, 16):
            _kernel(device, f"{direction}_{word}")


def current_device() -> int:
    """CuPy's current device in this thread.

    Raises:
        UnsupportedError: no CuPy, or no device it can use.
    """
    cupy = import_cupy()
    try:
        return int(cupy.cuda.runtime.getDevice())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise UnsupportedError(
            f"CuPy finds no GPU that it can use: {error}.",
            next_step="Check the driver (nvidia-smi or rocm-smi) and CUDA_VISIBLE_DEVICES.",
        ) from error


def import_cupy() -> Any:
    """CuPy.

    Raises:
        UnsupportedError: it is not installed, or its libraries are not.
    """
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedError(
            f"CuPy cannot be imported: {error}.",
            next_step="Install lmkv-ray[cuda] or lmkv-ray[rocm].",
        ) from error
    return cupy


def source() -> str:
    """The text of pages.cu."""
    return files("lmkv_ray.kernels").joinpath("pages.cu").read_text()


def grid_and_word(
    launch: PageLaunch, at: PageAddresses, grid_limit: int
) -> tuple[int, int, np.uint32]:
    """Thread blocks, bytes of one access, and tiles of one page, of a launch that is not empty.

    Raises:
        IndexError: more tiles than a kernel counts.
    """
    word = alignment(launch.alignment | at.cache | at.buffer)
    parts = -(-launch.page_bytes // (LANES * UNROLL * word))
    tiles = parts * launch.targets * launch.runs
    if tiles >= 1 << 31:
        raise IndexError(f"{tiles} tiles in one launch: copy fewer blocks at a time")
    grid = min(-(-tiles // (THREADS // LANES)), max(1, grid_limit))
    return grid, word, np.uint32(parts)


def _queue(
    direction: str, launch: PageLaunch, at: PageAddresses, stream: int, grid_limit: int | None
) -> None:
    if not launch.targets:
        return
    cupy, device = import_cupy(), current_device()
    limit = _full_grid(device) if grid_limit is None else grid_limit
    grid, word, parts = grid_and_word(launch, at, limit)
    kernel = _kernel(device, f"{direction}_{word}")
    arguments = kernel_arguments(launch, at, parts)
    with cupy.cuda.ExternalStream(stream):
        kernel((grid,), (THREADS,), arguments)


def kernel_arguments(
    launch: PageLaunch, at: PageAddresses, parts: np.uint32
) -> tuple[np.uint64 | np.uint32, ...]:
    """The parameters of every kernel of pages.cu, in order."""
    return (
        np.uint64(at.cache),
        np.uint64(at.buffer),
        np.uint64(at.runs + launch.first_run * RUN.itemsize),
        np.uint64(at.targets),
        np.uint32(launch.runs),
        np.uint32(launch.targets),
        parts,
    )


@functools.cache
def _module(device: int) -> Any:
    module = import_cupy().RawModule(code=source(), options=OPTIONS)
    module.compile()
    return module


@functools.cache
def _kernel(device: int, name: str) -> Any:
    return _module(device).get_function(name)


@functools.cache
def _full_grid(device: int) -> int:
    runtime = import_cupy().cuda.runtime
    return 2 * int(runtime.getDeviceProperties(device)["multiProcessorCount"])
