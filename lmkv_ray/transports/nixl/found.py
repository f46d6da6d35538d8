"""What is known of chunks of a peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lmkv_ray.transports.nixl.source import Located
from lmkv_ray.transports.nixl.wire import Looked


@dataclass(frozen=True)
class Found:
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
    def of(cls, answer: Located | Looked, n: int) -> Self:
        """Those of an answer.

        Raises:
            ValueError: it is not for ``n`` keys.
        """
        found = cls(
            np.frombuffer(answer.nbytes, np.int64),
            np.frombuffer(answer.offsets, np.uint64),
            np.frombuffer(answer.generations, np.uint64),
            np.frombuffer(answer.checksums, np.uint64),
        )
        if any(len(array) != n for array in found.arrays):
            raise ValueError("it is not for the keys that were asked for")
        return found

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        return self.nbytes, self.offsets, self.generations, self.checksums

    def part(self, window: range) -> Self:
        """A copy of some of them."""
        return type(self)(*(array[window.start : window.stop].copy() for array in self.arrays))

    def fill(self, positions: npt.NDArray[np.intp], others: Self) -> None:
        """Note what was not known."""
        for array, other in zip(self.arrays, others.arrays, strict=True):
            array[positions] = other
