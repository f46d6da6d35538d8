"""What a shard and its NIXL processes say to each other, over a socket pair."""

from __future__ import annotations

import socket
import struct
from typing import TypeVar

import msgspec

from lmkv_ray.messages import Message, encode

PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl_rocm")
"""Wheels of NIXL. The package ``nixl`` chooses among them by importing torch, which we need not."""
ROW = 4
"""Numbers of a row of ``Read``: offset here, offset there, bytes, checksum; uint64 each."""


class Register(Message, frozen=True, tag=True):
    """Make extents of the arena readable for peers."""

    extents: list[int]


class Read(Message, frozen=True, tag=True):
    """Read chunks of a peer into slots, and verify them there."""

    agent: str
    """The peer's agent."""
    metadata: bytes
    """Of that agent; empty if the process was told already."""
    replaces: str
    """An agent that is no more, if it is known; else empty."""
    base: int
    """Address of the peer's data area."""
    extent_bytes: int
    """The peer's extents; a descriptor must not reach into two of them."""
    rows: bytes
    """uint64[n, ROW]."""


class Serve(Message, frozen=True, tag=True):
    """A peer is about to read: attend to it. Not answered."""


class Request(Message, frozen=True):
    """Shard to process."""

    number: int
    command: Register | Read | Serve


class Ready(Message, frozen=True, tag=True):
    """The first answer: the agent's name, new in each life, and where it has mapped the data."""

    agent: str
    base: int


class Registered(Message, frozen=True, tag=True):
    """All that was registered so far, for peers to load."""

    metadata: bytes


class Arrived(Message, frozen=True, tag=True):
    """The chunks are in their slots, and nothing writes there any more."""

    intact: bytes
    """For each row: 1 if the bytes have the checksum, else 0."""


class Failed(Message, frozen=True, tag=True):
    """It did not work; nothing writes into the slots any more."""

    why: str


Result = Ready | Registered | Arrived | Failed


class Answer(Message, frozen=True):
    """Process to shard."""

    number: int
    result: Result


_LENGTH = struct.Struct("<I")
M = TypeVar("M", bound=Message)


def send(link: socket.socket, message: Message) -> None:
    """Send a message. Blocks while the other side does not read.

    Raises:
        OSError: the other side is gone.
    """
    body = encode(message)
    link.sendall(_LENGTH.pack(len(body)) + body)


def receive(link: socket.socket, decoder: msgspec.msgpack.Decoder[M]) -> M | None:
    """The next message; None when the other side is gone."""
    try:
        head = _exactly(link, _LENGTH.size)
        body = _exactly(link, *_LENGTH.unpack(head)) if head else None
    except OSError:
        return None
    return decoder.decode(body) if body else None


def _exactly(link: socket.socket, n: int) -> bytes | None:
    data = bytearray()
    while len(data) < n:
        part = link.recv(n - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
