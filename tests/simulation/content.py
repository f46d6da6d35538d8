"""Made-up chunks whose bytes say what they are, and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import count

import numpy as np
import numpy.typing as npt

from lmkv_ray.tenants import covers
from tests.simulation.story import Violation

CHUNK_BYTES = 1 << 10
SLOT_BYTES = 64 << 10
"""Slots are larger than chunks: so an arena of the smallest size is full with few of them."""
UNIT = 32
"""Bytes that a chunk repeats: key, version, checksum of both."""


def key_of(space: int, family: int, position: int, branch: int = 0) -> bytes:
    """The key of a chunk of a made-up prompt.

    Args:
        space: of the engine's namespace.
        family: prompts of one family begin alike.
        position: of the chunk in the prompt.
        branch: which continuation of the family.
    """
    return blake2b(f"{space}/{family}/{branch}/{position}".encode(), digest_size=16).digest()


def slice_of(key: bytes) -> bytes:
    """The key of the slice of a chunk that an engine's workers on its second node have."""
    return blake2b(key, digest_size=16).digest()


class Contents:
    """Every chunk that was ever filled, and every clear."""

    def __init__(self) -> None:
        self._versions = count(1)
        self._minted: dict[int, tuple[bytes, int, float]] = {}
        """By version: key, space, and when it began to be filled."""
        self.clears: dict[int, tuple[int | None, float]] = {}
        """By number: the space, and when the clear was asked for."""
        self._asked_last = 0.0

    def cleared(self, number: int, space: int | None, asked: float) -> None:
        """A clear was answered."""
        self.clears[number] = space, asked
        self._asked_last = max(self._asked_last, asked)

    def mint(self, key: bytes, space: int, now: float) -> npt.NDArray[np.uint8]:
        """The bytes of a chunk that is going to be filled."""
        version = next(self._versions)
        self._minted[version] = key, space, now
        head = key + version.to_bytes(8, "little")
        unit = head + blake2b(head, digest_size=8).digest()
        return np.frombuffer(unit * (CHUNK_BYTES // UNIT), np.uint8)

    def version(self, data: npt.NDArray[np.uint8], key: bytes, where: str) -> int:
        """What a reader got.

        Raises:
            Violation: these are not the bytes of the key.
        """
        unit = data[:UNIT].tobytes()
        version = int.from_bytes(unit[16:24], "little")
        minted = self._minted.get(version)
        if minted is None or minted[0] != key:
            raise Violation(f"{where}: wrong bytes under key {key.hex()[:8]}")
        if len(data) != CHUNK_BYTES or data.tobytes() != unit * (CHUNK_BYTES // UNIT):
            raise Violation(f"{where}: torn bytes under key {key.hex()[:8]}")
        return version

    def check_age(self, version: int, cleared: int, where: str) -> None:
        """A node that has carried out clears holds nothing that is older.

        Args:
            version: of a chunk in its memory.
            cleared: the number of the last clear that the node has carried out.
            where: for the message.

        Raises:
            Violation: it does.
        """
        key, space, minted = self._minted[version]
        if minted >= self._asked_last:
            return
        for number, (which, asked) in self.clears.items():
            if number <= cleared and minted < asked and covers(which, space):
                raise Violation(
                    f"{where}: key {key.hex()[:8]} of {minted:.3f} is still there, though the node "
                    f"has carried out the clear of {asked:.3f}"
                )


def joined(keys: Sequence[bytes]) -> bytes:
    return b"".join(keys)
