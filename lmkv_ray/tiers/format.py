"""What the file of a chunk is called, and what its bytes mean.

    header (one page)   payload as stored, padded with zeros to whole pages

The name says everything the index needs (key, space, size, suite), so that a directory can be
taken into use by listing it. The header says it again, with a checksum of the payload, so that
nothing is believed that was not verified: a file that was renamed, cut, torn or overwritten is
noticed when it is read. Numbers are little-endian; a directory may move to another machine.

All parts are whole pages, so that O_DIRECT moves the payload between file and arena slot.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import xxhash

PAGE = 4096
MAGIC = b"lmkvdisk"
VERSION = 2

# magic, version, overhead, key, space, nbytes: what a cipher binds the payload to.
_BOUND = struct.Struct("<8sII16sQQ")
# checksum, nonce, mark
_REST = struct.Struct("<Q12s4xQ")
_SEAL = struct.Struct("<Q")
_SEALED = PAGE - _SEAL.size

_PATH = re.compile(r"../([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{1,16})\.([a-z0-9-]{1,32})")


@dataclass(frozen=True, slots=True)
class Label:
    """Which chunk it is."""

    key: bytes
    """16 bytes."""
    space: int
    nbytes: int
    """Size of the chunk in memory."""

    def path(self, suite: str) -> str:
        """Its file, relative to the tier's directory. 256 subdirectories keep listings short."""
        key = self.key.hex()
        return f"{key[:2]}/{key}-{self.space:016x}-{self.nbytes:x}.{suite}"

    def bound(self, overhead: int) -> bytes:
        """The part of the header that a cipher authenticates together with the payload."""
        return _BOUND.pack(MAGIC, VERSION, overhead, self.key, self.space, self.nbytes)


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """The first page of a file."""

    label: Label
    overhead: int
    """Bytes by which the stored payload is longer than the chunk (a cipher's tag)."""
    checksum: int
    """``arena.checksum`` of the chunk; 0 if a cipher vouches for it."""
    nonce: bytes
    """12 bytes; zeros without a cipher."""
    mark: int = 0
    """Of its space when it was stored in a store that many share: see ``remote/clears.py``."""

    def pack(self) -> bytes:
        """One page."""
        fields = self.label.bound(self.overhead) + _REST.pack(self.checksum, self.nonce, self.mark)
        page = fields.ljust(_SEALED, b"\0")
        return page + _SEAL.pack(xxhash.xxh3_64_intdigest(page))

    @classmethod
    def unpack(cls, page: bytes) -> ChunkHeader | None:
        """The header in a page; None if it is none of ours, of another version, or damaged."""
        if len(page) != PAGE or not page.startswith(MAGIC):
            return None
        if _SEAL.unpack_from(page, _SEALED)[0] != xxhash.xxh3_64_intdigest(page[:_SEALED]):
            return None
        _, version, overhead, key, space, nbytes = _BOUND.unpack_from(page)
        if version != VERSION:
            return None
        checksum, nonce, mark = _REST.unpack_from(page, _BOUND.size)
        return cls(Label(key, space, nbytes), overhead, checksum, nonce, mark)


def parse_path(path: str) -> tuple[Label, str] | None:
    """Label and suite that a file's path says; None if we would not have called any file so."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    key, space, nbytes, suite = match.groups()
    label = Label(bytes.fromhex(key), int(space, 16), int(nbytes, 16))
    # Only the one spelling that we write: two files must not claim the same chunk.
    return (label, suite) if label.nbytes and label.path(suite) == path else None


def file_bytes(nbytes: int, overhead: int) -> int:
    """Size of the file of a chunk of ``nbytes``."""
    return PAGE + -(-(nbytes + overhead) // PAGE) * PAGE
