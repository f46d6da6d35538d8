"""How long an engine computes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmkv_ray.cost.fit import Floats, LinearFit


class PrefillModel:
    """Seconds to compute ``new`` tokens behind ``past`` ones, learnt from the engine's own steps.

    ``a + b * new + c * new * (past + new / 2)``: fixed cost, matrix products, attention. The first
    guess is a slow machine: until steps were seen, loading is believed to be worth it.
    """

    def __init__(self) -> None:
        self._fit = LinearFit((1e-3, 1e-3, 1e-8))

    @property
    def observations(self) -> int:
        """Steps seen."""
        return self._fit.observations

    def observe(self, new: float, past: float, seconds: float) -> None:
        """A step computed ``new`` tokens in ``seconds``."""
        self._fit.observe((1.0, new, new * (past + new / 2)), seconds)

    def seconds(self, new: npt.ArrayLike, past: npt.ArrayLike) -> Floats:
        """Expected seconds, elementwise; nothing to compute takes no time."""
        n, p = np.broadcast_arrays(np.asarray(new, np.float64), np.asarray(past, np.float64))
        x = np.stack([np.ones_like(n), n, n * (p + n / 2)], axis=-1)
        return np.where(n > 0, self._fit.predict(x), 0.0)
