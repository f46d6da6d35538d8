"""Where the tests run the page kernels: in this process as C++, or on a GPU.

Both take the memory as NumPy arrays and leave the results there.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lmkv_ray.kernels import TARGET, PageAddresses, PageLaunch, PageTable, pages

Bytes = npt.NDArray[np.uint8]

HERE = Path(__file__).parent
KERNELS = Path(pages.__file__).parent


class Copy(NamedTuple):
    """One launch, and the memory it works on."""

    direction: str
    """"gather": cache to buffer; "scatter": buffer to cache."""
    table: PageTable
    launch: PageLaunch
    targets: npt.NDArray[np.void]
    cache: Bytes
    buffer: Bytes
    grid_limit: int


class Backend(Protocol):
    """Runs launches."""

    def run(self, copy: Copy) -> None:
        """Run one to its end."""


@functools.cache
def library(*flags: str) -> ctypes.CDLL:
    """pages.cu behind host.h, compiled by g++."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pages.so")
        command = ["g++", "-std=c++14", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        command += ["-Wno-unknown-pragmas", f"-I{KERNELS}", *flags]
        subprocess.run([*command, str(HERE / "host.cc"), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


class HostBackend:
    """The kernels as C++, one thread after the other."""

    def __init__(self, *flags: str) -> None:
        self._library = library(*flags)

    def run(self, copy: Copy) -> None:
        tables = copy.table.runs.ctypes.data, copy.targets.ctypes.data
        at = PageAddresses(copy.cache.ctypes.data, copy.buffer.ctypes.data, *tables)
        self.launch(copy.direction, copy.launch, at, copy.grid_limit)

    def launch(
        self, direction: str, launch: PageLaunch, at: PageAddresses, grid_limit: int
    ) -> None:
        """As ``pages.gather`` and ``pages.scatter``, done when it returns."""
        grid, word, parts = pages.grid_and_word(launch, at, grid_limit)
        kernel = ctypes.cast(getattr(self._library, f"{direction}_{word}"), ctypes.c_void_p)
        kinds = {np.uint64: ctypes.c_void_p, np.uint32: ctypes.c_uint}
        arguments = [
            kinds[type(value)](int(value)) for value in pages.kernel_arguments(launch, at, parts)
        ]
        self._library.launch(kernel, ctypes.c_uint(grid), ctypes.c_uint(pages.THREADS), *arguments)


class GpuBackend:
    """The real thing: every memory is copied to the device, and back after the launch."""

    def run(self, copy: Copy) -> None:
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)
        memory = copy.cache, copy.buffer, copy.table.runs, copy.targets
        with stream:
            there = [_upload(cupy, a) for a in memory]
            at = PageAddresses(*(a.data.ptr for a in there))
            queue = {"gather": pages.gather, "scatter": pages.scatter}[copy.direction]
            queue(copy.launch, at, stream=stream.ptr, grid_limit=copy.grid_limit)
            copy.cache[:], copy.buffer[:] = there[0].get(), there[1].get()
        stream.synchronize()


def _upload(cupy: Any, array: npt.NDArray[Any]) -> Any:
    """A device copy as far from a multiple of 16 bytes as the array itself is."""
    raw = np.frombuffer(array.tobytes(), np.uint8)
    shift = array.ctypes.data % 16
    there = cupy.empty(len(raw) + shift, np.uint8)[shift:]
    there.set(raw)
    return there


def gpu_missing() -> str:
    """Why no GPU can be used; empty where one can."""
    try:
        pages.current_device()
    except Exception as error:
        return str(error)
    return ""


def empty_targets(count: int) -> npt.NDArray[np.void]:
    """Room for the targets of ``count`` blocks."""
    return np.zeros(count, TARGET)
