"""As much of CuPy as ``CupyDevice`` uses, with its signatures, on the host and at once.

Signatures and error codes are those of CuPy 14 (cupy_backends/cuda/api/runtime.pyx).
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np

NOT_READY = 600


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"error {status}")
        self.status = status


class CUDADriverError(RuntimeError):
    pass


class Runtime:
    """``cupy.cuda.runtime``; ``broken`` is the status of all queries and copies from now on."""

    CUDARuntimeError = CUDARuntimeError
    hostAllocMapped = 2  # noqa: N815
    is_hip = False

    def __init__(self) -> None:
        self.broken = 0
        self.registered: dict[int, int] = {}

    def setDevice(self, device: int) -> None:  # noqa: N802
        if device:
            raise CUDARuntimeError(101)

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        return {"name": b"a fake"}

    def deviceGetPCIBusId(self, device: int) -> str:  # noqa: N802
        return "0000:0A:00.0"

    def eventRecord(self, event: int, stream: int) -> None:  # noqa: N802
        assert event
        assert stream

    def eventQuery(self, event: int) -> int:  # noqa: N802
        return self.broken

    def streamQuery(self, stream: int) -> int:  # noqa: N802
        return self.broken

    def streamWaitEvent(self, stream: int, event: int, flags: int = 0) -> None:  # noqa: N802
        assert event
        assert stream

    def memcpy(self, dst: int, src: int, size: int, kind: int) -> None:
        ctypes.memmove(dst, src, size)

    def memcpyAsync(  # noqa: N802
        self, dst: int, src: int, size: int, kind: int, stream: int
    ) -> None:
        if self.broken:
            raise CUDARuntimeError(self.broken)
        assert kind in (1, 2)
        ctypes.memmove(dst, src, size)

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:  # noqa: N802
        self.registered[ptr] = size

    def hostUnregister(self, ptr: int) -> None:  # noqa: N802
        del self.registered[ptr]


class _Owned:
    """``Memory`` and ``PinnedMemory``."""

    def __init__(self, size: int, flags: int = 0) -> None:
        self._data = np.zeros(size, np.uint8)
        self.ptr = self._data.ctypes.data


def fake_cupy() -> Any:
    """A module."""
    cuda = SimpleNamespace(
        runtime=Runtime(),
        driver=SimpleNamespace(CUDADriverError=CUDADriverError),
        memory=SimpleNamespace(Memory=_Owned),
        pinned_memory=SimpleNamespace(PinnedMemory=_Owned),
        Stream=lambda *, non_blocking: SimpleNamespace(ptr=11),
        Event=lambda *, disable_timing: SimpleNamespace(ptr=22),
    )
    return SimpleNamespace(cuda=cuda)
