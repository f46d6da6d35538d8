"""Which part of the directory knows which keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmkv_ray.keys import KeyArray, parts_of


def positions_by_part(keys: KeyArray, parts: int) -> dict[int, npt.NDArray[np.intp]]:
    """Which of the keys each part of the directory is to be asked for.

    Args:
        keys: uint64[n, 2].
        parts: how many parts the directory has.

    Returns:
        by part the positions of its keys, ascending; parts without keys are left out.
    """
    part_of = parts_of(keys, parts)
    return {part: np.flatnonzero(part_of == part) for part in np.unique(part_of).tolist()}
