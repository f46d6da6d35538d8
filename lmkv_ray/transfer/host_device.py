"""A device that is the host itself: what is queued is done at once.

The engine of streams runs on it where there is no GPU: for tests, and to measure what the engine
costs beside the copies.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from lmkv_ray.kernels import RUN, TARGET, PageAddresses, PageLaunch
from lmkv_ray.transfer.base import Bytes, Ints
from lmkv_ray.transfer.device import Direction, Event, Memory, Stream


class HostDevice:
    """See ``Device``. Streams and events are nothing, as there is never anything to wait for."""

    name = "host"

    def enter(self) -> None:
        """See ``Device``."""

    def stream(self) -> Stream:
        """See ``Device``."""
        return None

    def mark(self) -> Event:
        """See ``Device``."""
        return None

    def record(self, stream: Stream) -> Event:
        """See ``Device``."""
        return None

    def wait(self, stream: Stream, event: Event) -> None:
        """See ``Device``."""

    def done(self, event: Event) -> bool:
        """See ``Device``."""
        return True

    def idle(self, stream: Stream) -> bool:
        """See ``Device``."""
        return True

    def allocate(self, nbytes: int) -> Memory:
        """See ``Device``."""
        data = np.zeros(nbytes, np.uint8)
        return Memory(data.ctypes.data, nbytes, data, data)

    def registered(self, nbytes: int) -> Memory:
        """See ``Device``."""
        return self.allocate(nbytes)

    def upload(self, data: Bytes) -> Memory:
        """See ``Device``."""
        memory = self.allocate(data.nbytes)
        memory.owner[:] = data
        return memory

    def copy(
        self,
        stream: Stream,
        direction: Direction,
        to: Ints,
        source: Ints,
        nbytes: Ints,
        *,
        registered: bool,
    ) -> None:
        """See ``Device``."""
        for each in zip(to.tolist(), source.tolist(), nbytes.tolist(), strict=True):
            ctypes.memmove(*each)

    def gather(self, stream: Stream, launch: PageLaunch, at: PageAddresses) -> None:
        """See ``Device``."""
        for in_cache, in_buffer, nbytes in pages(launch, at):
            ctypes.memmove(in_buffer, in_cache, nbytes)

    def scatter(self, stream: Stream, launch: PageLaunch, at: PageAddresses) -> None:
        """See ``Device``."""
        for in_cache, in_buffer, nbytes in pages(launch, at):
            ctypes.memmove(in_cache, in_buffer, nbytes)

    def register(self, address: int, nbytes: int) -> None:
        """See ``Device``."""

    def unregister(self, address: int) -> None:
        """See ``Device``."""


def pages(launch: PageLaunch, at: PageAddresses) -> list[tuple[int, int, int]]:
    """The pages of a launch as its tables say now: address in cache and buffer, and size."""
    runs = _table(at.runs + launch.first_run * RUN.itemsize, launch.runs, RUN)
    targets = _table(at.targets, launch.targets, TARGET)
    block, index = targets["block"].astype(np.int64), targets["index"].astype(np.int64)
    found: list[tuple[int, int, int]] = []
    for offset, stride, chunk_offset, nbytes in runs.tolist():
        in_cache = (at.cache + offset + block * stride).tolist()
        in_buffer = (at.buffer + targets["chunk"] + chunk_offset + index * nbytes).tolist()
        found += zip(in_cache, in_buffer, [nbytes] * len(targets), strict=True)
    return found


def _table(address: int, count: int, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return np.ctypeslib.as_array(memory).view(dtype)
