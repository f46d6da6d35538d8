"""A GPU by CuPy: CUDA, or ROCm with CuPy's build for it.

What is relied on, with its source:

* A registered range is copied by DMA; a copy may not touch registered and other memory at once
  (CUDA driver API, cuMemcpy: "Memory regions requested must be either entirely registered with
  CUDA, or in the case of host pageable transfers, not registered at all").
* Copies of pageable memory are in stream order, but the call returns when the host's side is done
  (CUDA runtime API, "API synchronization behavior").
* ``cudaEventQuery`` returns, not raises, ``cudaErrorNotReady`` (600) in CuPy; so does ROCm's.
* A wait is for what the event had recorded when the wait was queued; destroying an event that is
  still to pass is allowed (CUDA runtime API, cudaStreamWaitEvent, cudaEventDestroy).
* Registered memory of ``cudaHostAlloc`` is mapped: kernels read it at its host address (unified
  addressing). That is how they read their tables, which uploads would hold up behind the bulk of
  the other lane in the same copy engine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lmkv_ray.errors import UnsupportedError
from lmkv_ray.kernels import PageAddresses, PageLaunch, pages
from lmkv_ray.transfer.base import Bytes, Ints
from lmkv_ray.transfer.batched import BatchedCopy
from lmkv_ray.transfer.device import DeviceError, Direction, Memory

_NOT_READY = 600
_KIND = {Direction.TO_DEVICE: 1, Direction.FROM_DEVICE: 2}
"""cudaMemcpyHostToDevice and cudaMemcpyDeviceToHost."""


class CupyDevice:
    """See ``Device``.

    Args:
        number: of the device, as CuPy and the model count them.
        model_stream: the stream on which the model's steps are queued, as an address; called in
            the engine's thread.

    Raises:
        UnsupportedError: no CuPy, or no such device.
    """

    def __init__(self, number: int, model_stream: Callable[[], int]) -> None:
        cupy = pages.import_cupy()
        self._cuda = cupy.cuda
        self._runtime = cupy.cuda.runtime
        self._number = number
        self._model_stream = model_stream
        try:
            with self._errors():
                self.enter()
                properties = self._runtime.getDeviceProperties(number)
                self.bus = str(self._runtime.deviceGetPCIBusId(number))
                """PCI address, as /sys/bus/pci/devices has it but for upper case."""
        except DeviceError as error:
            raise UnsupportedError(
                f"CuPy cannot use GPU {number}: {error}.",
                next_step="Check the driver (nvidia-smi or rocm-smi), and that CuPy is built for "
                "it: lmkv-ray[cuda] or lmkv-ray[rocm].",
            ) from error
        self.name = f"GPU {number} ({properties['name'].decode()})"
        self._batched = BatchedCopy.find(rocm=bool(self._runtime.is_hip))
        pages.prepare()

    def enter(self) -> None:
        """See ``Device``."""
        with self._errors():
            self._runtime.setDevice(self._number)

    def stream(self) -> Any:
        """See ``Device``."""
        with self._errors():
            return self._cuda.Stream(non_blocking=True)

    def mark(self) -> Any:
        """See ``Device``."""
        with self._errors():
            event = self._cuda.Event(disable_timing=True)
            self._runtime.eventRecord(event.ptr, self._model_stream())
            return event

    def record(self, stream: Any) -> Any:
        """See ``Device``."""
        with self._errors():
            event = self._cuda.Event(disable_timing=True)
            self._runtime.eventRecord(event.ptr, stream.ptr)
            return event

    def wait(self, stream: Any, event: Any) -> None:
        """See ``Device``."""
        with self._errors():
            self._runtime.streamWaitEvent(stream.ptr, event.ptr)

    def done(self, event: Any) -> bool:
        """See ``Device``."""
        return self._ready(self._runtime.eventQuery(event.ptr))

    def idle(self, stream: Any) -> bool:
        """See ``Device``."""
        return self._ready(self._runtime.streamQuery(stream.ptr))

    def allocate(self, nbytes: int) -> Memory:
        """See ``Device``."""
        with self._errors():
            # Not from CuPy's pool, which would keep it.
            memory = self._cuda.memory.Memory(nbytes)
            return Memory(memory.ptr, nbytes, memory)

    def registered(self, nbytes: int) -> Memory:
        """See ``Device``."""
        with self._errors():
            memory = self._cuda.pinned_memory.PinnedMemory(nbytes, self._runtime.hostAllocMapped)
            view = (ctypes.c_uint8 * nbytes).from_address(memory.ptr)
            return Memory(memory.ptr, nbytes, memory, np.ctypeslib.as_array(view))

    def upload(self, data: Bytes) -> Memory:
        """See ``Device``."""
        memory = self.allocate(data.nbytes)
        with self._errors():
            self._runtime.memcpy(memory.address, data.ctypes.data, data.nbytes, 1)
        return memory

    def copy(
        self,
        stream: Any,
        direction: Direction,
        to: Ints,
        source: Ints,
        nbytes: Ints,
        *,
        registered: bool,
    ) -> None:
        """See ``Device``."""
        with self._errors():
            if registered and self._batched is not None and len(to) > 1:
                self._batched.copy(stream.ptr, to, source, nbytes)
                return
            kind, copy, queue = _KIND[direction], self._runtime.memcpyAsync, stream.ptr
            for t, s, n in zip(to.tolist(), source.tolist(), nbytes.tolist(), strict=True):
                copy(t, s, n, kind, queue)

    def gather(self, stream: Any, launch: PageLaunch, at: PageAddresses) -> None:
        """See ``Device``."""
        with self._errors():
            pages.gather(launch, at, stream=stream.ptr)

    def scatter(self, stream: Any, launch: PageLaunch, at: PageAddresses) -> None:
        """See ``Device``."""
        with self._errors():
            pages.scatter(launch, at, stream=stream.ptr)

    def register(self, address: int, nbytes: int) -> None:
        """See ``Device``."""
        with self._errors():
            self._runtime.hostRegister(address, nbytes, 0)

    def unregister(self, address: int) -> None:
        """See ``Device``."""
        with self._errors():
            self._runtime.hostUnregister(address)

    def _ready(self, status: int) -> bool:
        if status not in (0, _NOT_READY):
            raise DeviceError(str(self._runtime.CUDARuntimeError(status)))
        return status == 0

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """CuPy's errors as ours."""
        try:
            yield
        except (self._runtime.CUDARuntimeError, self._cuda.driver.CUDADriverError) as error:
            raise DeviceError(str(error)) from error
