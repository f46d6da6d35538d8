"""Chunks as objects: the header of a chunk file, then its bytes. All of this takes CPU time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import checksum
from lmkv_ray.tiers.base import TierChunk
from lmkv_ray.tiers.cipher import NONCE_BYTES, Cipher, new_nonce
from lmkv_ray.tiers.format import PAGE, Header, Label
from lmkv_ray.transports import Failure


def pack(chunk: TierChunk, cipher: Cipher | None) -> list[Any]:
    """A copy of a chunk's bytes, ready to be sent."""
    label = Label(chunk.key, chunk.space, len(chunk.data))
    if cipher is None:
        copy = chunk.data.copy()
        header = Header(label, 0, checksum(copy), bytes(NONCE_BYTES))
        return [header.pack(), copy.data]
    nonce = new_nonce()
    sealed = bytearray(len(chunk.data) + cipher.overhead)
    cipher.seal(label, nonce, chunk.data, memoryview(sealed))
    return [Header(label, cipher.overhead, 0, nonce).pack(), bytes(sealed)]


def unpack(
    data: memoryview, key: bytes, cipher: Cipher | None, destination: npt.NDArray[np.uint8]
) -> tuple[int, int, int] | Failure:
    """Put an object's chunk into a slot, verified there.

    Returns:
        (space, nbytes, ``arena.checksum``), or why it cannot be used.
    """
    header = Header.unpack(bytes(data[:PAGE]))
    overhead = cipher.overhead if cipher else 0
    if header is None or header.label.key != key or header.overhead != overhead:
        return Failure.CORRUPT
    nbytes, stored = header.label.nbytes, data[PAGE:]
    if len(stored) != nbytes + overhead:
        return Failure.CORRUPT
    if nbytes > len(destination):
        return Failure.TOO_LARGE
    chunk = destination[:nbytes]
    if cipher is not None:
        if not cipher.open(header.label, header.nonce, stored, chunk.data):
            return Failure.CORRUPT
        return header.label.space, nbytes, checksum(chunk)
    chunk[:] = np.frombuffer(stored, np.uint8)
    value = checksum(chunk)
    return (header.label.space, nbytes, value) if value == header.checksum else Failure.CORRUPT
