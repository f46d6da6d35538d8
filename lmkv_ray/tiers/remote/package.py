"""Chunks as objects: the header of a chunk file, then its bytes. All of this takes CPU time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import checksum
from lmkv_ray.clock import Clock
from lmkv_ray.fetch import Failure
from lmkv_ray.tiers.base import TierChunk
from lmkv_ray.tiers.cipher import NONCE_BYTES, Cipher, new_nonce
from lmkv_ray.tiers.format import PAGE, ChunkHeader, Label


def pack(chunk: TierChunk, cipher: Cipher | None, mark: int, clock: Clock) -> list[Any]:
    """A copy of a chunk's bytes, ready to be sent; ``mark``: see ``SharedClears.mark``."""
    label = Label(chunk.key, chunk.space, len(chunk.data))
    if cipher is None:
        copy = chunk.data.copy()
        header = ChunkHeader(label, 0, checksum(copy), bytes(NONCE_BYTES), mark)
        return [header.pack(), copy.data]
    nonce = new_nonce(clock)
    sealed = bytearray(len(chunk.data) + cipher.overhead)
    cipher.seal(label, nonce, chunk.data, memoryview(sealed))
    return [ChunkHeader(label, cipher.overhead, 0, nonce, mark).pack(), bytes(sealed)]


def object_bytes(nbytes: int, cipher: Cipher | None) -> int:
    """Size of the object of a chunk of ``nbytes``."""
    return PAGE + nbytes + (cipher.overhead if cipher else 0)


def header_of(page: bytes, size: int, key: bytes, cipher: Cipher | None) -> ChunkHeader | None:
    """The header of this chunk.

    Args:
        page: the first bytes of an object.
        size: bytes of the whole object.
        key: what the object's name says.
        cipher: how it is to be read.

    Returns:
        None if this is no such object.
    """
    header = ChunkHeader.unpack(page)
    if header is None or header.label.key != key:
        return None
    sound = header.overhead == (cipher.overhead if cipher else 0)
    return header if sound and size == object_bytes(header.label.nbytes, cipher) else None


def unpack(
    data: memoryview, key: bytes, cipher: Cipher | None, destination: npt.NDArray[np.uint8]
) -> tuple[ChunkHeader, int] | Failure:
    """Put an object's chunk into a slot, verified there.

    Returns:
        its header and ``arena.checksum``, or why it cannot be used.
    """
    header = header_of(bytes(data[:PAGE]), len(data), key, cipher)
    if header is None:
        return Failure.CORRUPT
    nbytes, stored = header.label.nbytes, data[PAGE:]
    if nbytes > len(destination):
        return Failure.TOO_LARGE
    chunk = destination[:nbytes]
    if cipher is not None:
        if not cipher.open(header.label, header.nonce, stored, chunk.data):
            return Failure.CORRUPT
        return header, checksum(chunk)
    chunk[:] = np.frombuffer(stored, np.uint8)
    value = checksum(chunk)
    return (header, value) if value == header.checksum else Failure.CORRUPT
