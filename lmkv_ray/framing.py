"""Messages over a stream: each is a length of four bytes and its msgpack bytes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from lmkv_ray.messages import Message, encode

_LENGTH = struct.Struct("<I")
LONGEST = 1 << 28
"""Bytes of a message at most; a peer that announces more is not understood."""
M = TypeVar("M", bound=Message)


def framed(message: Message) -> bytes:
    """A message as it is sent."""
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


def send(link: socket.socket, message: Message) -> None:
    """Send a message. Blocks while the other side does not read.

    Raises:
        OSError: the other side is gone.
    """
    link.sendall(framed(message))


class Incoming(Generic[M]):
    """Makes messages of what arrives, in whatever pieces.

    Args:
        kind: the type that each message is decoded as.
    """

    def __init__(self, kind: type[M]) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[M]:
        """The messages that are complete with this piece.

        Raises:
            ValueError: this is no such message; nothing that follows can be understood.
        """
        self._data += data
        while len(self._data) >= _LENGTH.size:
            length = _LENGTH.unpack_from(self._data)[0]
            if length > LONGEST:
                raise ValueError(f"a message of {length} bytes is announced")
            end = _LENGTH.size + length
            if len(self._data) < end:
                return
            message = self._decoder.decode(self._data[_LENGTH.size : end])
            del self._data[:end]
            yield message
