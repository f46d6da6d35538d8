"""What the engine of streams needs of a device: CUDA's model, and no more of it.

Work is queued on streams. A stream does its work in order; between streams only events order
anything. Nothing here waits for the device but ``upload``, ``close`` and copies of memory that is
not registered. Addresses are those of one address space for host and device (unified addressing).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from lmkv_ray.kernels import PageAddresses, PageLaunch
from lmkv_ray.transfer.base import Bytes, Ints

Stream = Any
Event = Any


class Direction(Enum):
    """Of a copy."""

    TO_DEVICE = 1
    FROM_DEVICE = 2


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of the device, or registered memory of the host; it lives as long as this object."""

    address: int
    nbytes: int
    owner: Any
    host: Bytes | None = None
    """The bytes, if they are the host's."""


class DeviceError(Exception):
    """The device refused something; what was queued may or may not have been done."""


class Device(Protocol):
    """One device, used by a few threads. Everything may raise ``DeviceError``."""

    name: str

    def enter(self) -> None:
        """Make this the current device of the calling thread."""

    def stream(self) -> Stream:
        """A new stream that waits for no other."""

    def mark(self) -> Event:
        """An event behind everything that the model's stream has been given so far."""

    def record(self, stream: Stream) -> Event:
        """A new event behind everything on the stream."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What is queued on the stream from now on comes after the event."""

    def done(self, event: Event) -> bool:
        """Whether the event has come to pass, and so all before it."""

    def idle(self, stream: Stream) -> bool:
        """Whether nothing is left to do on a stream."""

    def allocate(self, nbytes: int) -> Memory:
        """Memory of the device."""

    def registered(self, nbytes: int) -> Memory:
        """Memory of the host that kernels can read."""

    def upload(self, data: Bytes) -> Memory:
        """A copy in the device's memory; waits until it is there."""

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
        """Queue copies between host and device, in any order among themselves.

        Args:
            stream: to queue them on.
            direction: of all of them.
            to: addresses, int64[n].
            source: addresses, int64[n].
            nbytes: sizes, int64[n].
            registered: all of the host's memory in them is registered with the device, so that they
                may go as one batch and nothing waits.
        """

    def gather(self, stream: Stream, launch: PageLaunch, at: PageAddresses) -> None:
        """Queue the copy of pages from the cache into a buffer."""

    def scatter(self, stream: Stream, launch: PageLaunch, at: PageAddresses) -> None:
        """Queue the copy of pages from a buffer into the cache."""

    def register(self, address: int, nbytes: int) -> None:
        """Register memory of the host."""

    def unregister(self, address: int) -> None:
        """Undo ``register``; nothing may be under way there."""
