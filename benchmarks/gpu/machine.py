"""The machine under measurement: a GPU through CuPy, or this host instead.

All work goes to one stream, and ``seconds`` is the stream's own time where there is one.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lmkv_ray.errors import UnsupportedError
from lmkv_ray.kernels import PageAddresses, PageLaunch, pages
from lmkv_ray.transfer.cupy_device import CupyDevice
from lmkv_ray.transfer.device import Device
from lmkv_ray.transfer.host_device import HostDevice
from tests.kernels.backends import HostBackend

PAGE = 4096
"""Alignment of memory on the host: CPUs copy much slower from just past a page."""


class Area(NamedTuple):
    """Memory: its address, and what keeps it alive."""

    address: int
    owner: Any


class Machine(Protocol):
    """What the measurements need."""

    name: str
    scale: int
    """Bytes moved by one measurement: enough to outlast a launch, and no cache holds them."""

    def memory(self, nbytes: int) -> Area:
        """Memory of the device."""

    def registered(self, nbytes: int) -> Area:
        """Touched memory of the host that the device copies from and to at full speed."""

    def upload(self, table: npt.NDArray[Any]) -> Area:
        """A copy in the device's memory."""

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Queue one plain copy, in any direction."""

    def launch(
        self, direction: str, launch: PageLaunch, at: PageAddresses, grid_limit: int | None
    ) -> None:
        """Queue a gather or a scatter."""

    def seconds(self, action: Callable[[], object]) -> float:
        """What the work that ``action`` queues takes."""

    def device(self) -> Device:
        """The same device, for a transfer engine."""


class Gpu:
    """The current device of CuPy."""

    scale = 256 << 20

    def __init__(self) -> None:
        pages.prepare()
        self._cupy = pages.import_cupy()
        runtime = self._cupy.cuda.runtime
        properties = runtime.getDeviceProperties(pages.current_device())
        self.name = properties["name"].decode()
        self._stream = self._cupy.cuda.Stream(non_blocking=True)

    def memory(self, nbytes: int) -> Area:
        """See ``Machine``."""
        memory = self._cupy.cuda.memory.Memory(nbytes)  # no pool, which would keep it from vLLM
        return Area(memory.ptr, memory)

    def registered(self, nbytes: int) -> Area:
        """See ``Machine``."""
        memory = self._cupy.cuda.pinned_memory.PinnedMemory(nbytes)
        ctypes.memset(memory.ptr, 1, nbytes)
        return Area(memory.ptr, memory)

    def upload(self, table: npt.NDArray[Any]) -> Area:
        """See ``Machine``."""
        area = self.memory(table.nbytes)
        runtime = self._cupy.cuda.runtime
        runtime.memcpy(area.address, table.ctypes.data, table.nbytes, runtime.memcpyDefault)
        return area

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """See ``Machine``."""
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(to, source, nbytes, runtime.memcpyDefault, self._stream.ptr)

    def launch(
        self, direction: str, launch: PageLaunch, at: PageAddresses, grid_limit: int | None
    ) -> None:
        """See ``Machine``."""
        queue = {"gather": pages.gather, "scatter": pages.scatter}[direction]
        queue(launch, at, stream=self._stream.ptr, grid_limit=grid_limit)

    def seconds(self, action: Callable[[], object]) -> float:
        """See ``Machine``."""
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        begin.record(self._stream)
        action()
        end.record(self._stream)
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) / 1e3

    def device(self) -> Device:
        """See ``Machine``."""
        return CupyDevice(pages.current_device(), lambda: int(self._stream.ptr))


class Host:
    """No GPU: the kernels as C++, on one thread; proves the benchmark and not the speed."""

    name = "host (no GPU)"
    scale = 4 << 20

    def __init__(self) -> None:
        self._kernels = HostBackend("-O2")

    def memory(self, nbytes: int) -> Area:
        """See ``Machine``."""
        memory = np.ones(nbytes + PAGE, np.uint8)
        return Area(-(-memory.ctypes.data // PAGE) * PAGE, memory)

    registered = memory

    def upload(self, table: npt.NDArray[Any]) -> Area:
        """See ``Machine``."""
        copy = table.copy()
        return Area(copy.ctypes.data, copy)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """See ``Machine``."""
        ctypes.memmove(to, source, nbytes)

    def launch(
        self, direction: str, launch: PageLaunch, at: PageAddresses, grid_limit: int | None
    ) -> None:
        """See ``Machine``."""
        self._kernels.launch(direction, launch, at, grid_limit or pages.BESIDE_A_MODEL)

    def seconds(self, action: Callable[[], object]) -> float:
        """See ``Machine``."""
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    def device(self) -> Device:
        """See ``Machine``."""
        return HostDevice()


def find() -> tuple[Machine, str]:
    """The GPU, or this host and why there is no GPU."""
    try:
        return Gpu(), ""
    except UnsupportedError as error:
        return Host(), str(error)


def rate(machine: Machine, nbytes: int, action: Callable[[], object], repeats: int = 7) -> float:
    """Bytes per second, the median after a warm-up."""
    action()
    return nbytes / median(machine.seconds(action) for _ in range(repeats))
