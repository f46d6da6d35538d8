"""As much of CuPy as the package uses, on the host: launches run pages.cu as C++.

Names and argument orders are CuPy's; ``test_fake_cupy`` holds them against the real one.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from tests.kernels.backends import library


class _Memory:
    def __init__(self, nbytes: int) -> None:
        self._bytes = np.zeros(nbytes + 256, np.uint8)
        self.ptr = self._bytes.ctypes.data // 256 * 256 + 256


class _Stream:
    current: ClassVar = [0]

    def __init__(self, *, non_blocking: bool) -> None:
        self.ptr = 7


class _ExternalStream:
    def __init__(self, ptr: int) -> None:
        self._ptr = ptr

    def __enter__(self) -> None:
        _Stream.current.append(self._ptr)

    def __exit__(self, *error: object) -> None:
        _Stream.current.pop()


class _Event:
    def record(self, stream: _Stream) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass


class _Module:
    def __init__(self, *, code: str, options: tuple[str, ...]) -> None:
        self.code = code

    def compile(self) -> None:
        library()

    def get_function(self, name: str) -> Callable[..., None]:
        kernel = ctypes.cast(getattr(library(), name), ctypes.c_void_p)
        kinds = {np.uint64: ctypes.c_void_p, np.uint32: ctypes.c_uint}

        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            FakeCupy.launches.append((name, grid[0], _Stream.current[-1]))
            sizes = (ctypes.c_uint(grid[0]), ctypes.c_uint(block[0]))
            library().launch(kernel, *sizes, *(kinds[type(a)](int(a)) for a in arguments))

        return launch


def _copy(to: int, source: int, nbytes: int, kind: int, stream: int = 0) -> None:
    assert kind == 4
    ctypes.memmove(to, source, nbytes)


class FakeCupy(ModuleType):
    """Put into ``sys.modules`` as ``cupy``."""

    launches: ClassVar[list[tuple[str, int, int]]] = []
    """Kernel, thread blocks and stream."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.launches.clear()
        self.RawModule = _Module
        self.cuda = SimpleNamespace(
            Event=_Event,
            ExternalStream=_ExternalStream,
            Stream=_Stream,
            memory=SimpleNamespace(Memory=_Memory),
            pinned_memory=SimpleNamespace(PinnedMemory=_Memory),
            get_elapsed_time=lambda begin, end: 1e3 * (end.at - begin.at),
            runtime=SimpleNamespace(
                CUDARuntimeError=RuntimeError,
                getDevice=lambda: 0,
                getDeviceProperties=lambda device: {"name": b"fake", "multiProcessorCount": 3},
                memcpy=_copy,
                memcpyAsync=_copy,
                memcpyDefault=4,
            ),
        )
