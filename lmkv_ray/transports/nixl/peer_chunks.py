"""What is known of chunks of a peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lmkv_ray.transports.nixl.server import Located

Positions = npt.NDArray[np.intp]


@dataclass(frozen=True)
class PeerChunks:
    """Where chunks are at the peer, one element a key."""

    nbytes: npt.NDArray[np.int64]
    """Sizes, ``MISSING``, ``CHANGED``, or 0: not known yet."""
    offsets: npt.NDArray[np.uint64]
    generations: npt.NDArray[np.uint64]
    checksums: npt.NDArray[np.uint64]

    @classmethod
    def unknown(cls, n: int) -> Self:
        """Of ``n`` keys nothing is known."""
        return cls(np.zeros(n, np.int64), *(np.zeros(n, np.uint64) for _ in range(3)))

    @classmethod
    def of(cls, answer: Located, n: int) -> Self:
        """Those of an answer; a copy, to be filled in.

        Raises:
            ValueError: it is not for ``n`` keys.
        """
        found = cls(
            np.frombuffer(answer.nbytes, np.int64).copy(),
            np.frombuffer(answer.offsets, np.uint64).copy(),
            np.frombuffer(answer.generations, np.uint64).copy(),
            np.frombuffer(answer.checksums, np.uint64).copy(),
        )
        if any(len(array) != n for array in found.arrays):
            raise ValueError("it is not for the keys that were asked for")
        return found

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        return self.nbytes, self.offsets, self.generations, self.checksums

    def fill(self, positions: Positions, others: Self) -> None:
        """Note what was not known."""
        for array, other in zip(self.arrays, others.arrays, strict=True):
            array[positions] = other

    def fitting(self, room: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which are there, and not larger than the bytes there are for each."""
        return (self.nbytes > 0) & (self.nbytes <= room)

    def rows(self, positions: Positions, offsets: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Rows of ``wire.Read``, uint64[positions, ROW].

        Args:
            positions: which.
            offsets: for each key the offset here.
        """
        columns = offsets, self.offsets, self.nbytes.astype(np.uint64), self.checksums
        return np.stack([column[positions] for column in columns], axis=1)
