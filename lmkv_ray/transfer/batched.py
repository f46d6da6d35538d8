"""Many copies with one call: cuMemcpyBatchAsync of CUDA 12.8, hipMemcpyBatchAsync of ROCm 7.1.

CuPy has no binding for them. A copy in a batch costs the host half a microsecond where a call of
its own costs several (vLLM pull request 48434). Both libraries have the version of the function
that takes ``failIdx``: HIP has no other, and CUDA answers ``cuGetProcAddress`` with the one of the
version that is asked for, whatever its own.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import numpy as np

from lmkv_ray.transfer.base import Ints
from lmkv_ray.transfer.device import DeviceError

_CUDA_VERSION = 12080
"""Whose cuMemcpyBatchAsync is asked for."""

_STREAM_ORDER = 1
"""CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: sources are read when the stream comes to the copy. The arena
could be read earlier, but the engine's pages and the ring may not."""

_MOST = {"cuda": 1 << 16, "rocm": 8192}
"""Copies in one call; ROCm faults beyond (so vLLM's simple_kv_offload)."""

_HIP_TAKES_ATTRIBUTES = 71_300_000
"""Version 7.13 of HIP; those before it refuse attributes (so vLLM's simple_kv_offload)."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes; zeros say that there are no hints."""

    _fields_ = (
        ("source_access_order", ctypes.c_uint),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


_ARGUMENTS = (
    ctypes.c_void_p,  # targets
    ctypes.c_void_p,  # sources
    ctypes.c_void_p,  # sizes
    ctypes.c_size_t,  # count
    ctypes.c_void_p,  # attributes
    ctypes.c_void_p,  # first copy of each of the attributes
    ctypes.c_size_t,  # number of attributes
    ctypes.c_void_p,  # failIdx
    ctypes.c_void_p,  # stream
)


class BatchedCopy:
    """The function of this machine.

    Args:
        function: with ``_ARGUMENTS``, returning 0 if all is well.
        attributes: whether it takes any.
        most: copies in one call.
    """

    def __init__(self, function: Any, *, attributes: bool, most: int) -> None:
        self._function = function
        self._count = 1 if attributes else 0
        self._attributes = _Attributes(source_access_order=_STREAM_ORDER)
        self._most = most

    @classmethod
    def find(cls, *, rocm: bool) -> BatchedCopy | None:
        """The function of the libraries at hand, None if they are too old."""
        with contextlib.suppress(OSError, AttributeError):
            return cls._of_rocm() if rocm else cls._of_cuda()
        return None

    @classmethod
    def _of_cuda(cls) -> BatchedCopy | None:
        library = ctypes.CDLL("libcuda.so.1")
        pointer, status = ctypes.c_void_p(), ctypes.c_int()
        error = library.cuGetProcAddress_v2(
            b"cuMemcpyBatchAsync",
            ctypes.byref(pointer),
            ctypes.c_int(_CUDA_VERSION),
            ctypes.c_uint64(0),
            ctypes.byref(status),
        )
        if error or not pointer.value:
            return None
        prototype = ctypes.CFUNCTYPE(ctypes.c_uint, *_ARGUMENTS)
        return cls(prototype(pointer.value), attributes=True, most=_MOST["cuda"])

    @classmethod
    def _of_rocm(cls) -> BatchedCopy:
        library = ctypes.CDLL("libamdhip64.so.7")
        function = library.hipMemcpyBatchAsync
        function.restype, function.argtypes = ctypes.c_uint, _ARGUMENTS
        version = ctypes.c_int()
        library.hipRuntimeGetVersion(ctypes.byref(version))
        takes = version.value >= _HIP_TAKES_ATTRIBUTES
        return cls(function, attributes=takes, most=_MOST["rocm"])

    def copy(self, stream: int, to: Ints, source: Ints, nbytes: Ints) -> None:
        """Queue copies, in any order among themselves; all host memory in them is registered.

        Raises:
            DeviceError: the device refused one.
        """
        columns = [np.ascontiguousarray(column, np.uint64) for column in (to, source, nbytes)]
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        for at in range(0, len(to), self._most):
            count = min(self._most, len(to) - at)
            error = self._function(
                *(column[at:].ctypes.data for column in columns),
                count,
                ctypes.addressof(self._attributes) if self._count else None,
                ctypes.addressof(first) if self._count else None,
                self._count,
                ctypes.addressof(failed),
                stream,
            )
            if error:
                raise DeviceError(f"a batch of {count} copies was refused with error {error}")
