"""How long a source takes to deliver chunks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lmkv_ray.cost.fit import Floats, LinearFit

STALE_SECONDS = 5.0

MAX_SOURCES = 4096
"""Sources that are remembered; the one used longest ago makes room."""


class SourceModel:
    """Latency and bandwidth of one source.

    Args:
        latency: first guess, seconds.
        bandwidth: first guess, bytes per second.
        clock: seconds.
    """

    def __init__(
        self,
        latency: float = 2e-3,
        bandwidth: float = 1e9,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._observed_at = -STALE_SECONDS
        self._fit = LinearFit((latency, 1 / bandwidth), half_life=16)

    def observe(self, nbytes: float, seconds: float) -> None:
        """It delivered ``nbytes`` in ``seconds``."""
        self._fit.observe((1.0, nbytes), seconds)
        self._observed_at = self._clock()

    def is_stale(self) -> bool:
        """Whether it was not used for so long that what is known may not hold any more."""
        return self._clock() >= self._observed_at + STALE_SECONDS

    def seconds(self, nbytes: npt.ArrayLike) -> Floats:
        """Expected seconds until so many bytes are here, elementwise."""
        n = np.asarray(nbytes, np.float64)
        return self._fit.predict(np.stack([np.ones_like(n), n], axis=-1))


class SourceModels:
    """The models of all sources by name, bounded."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, SourceModel] = OrderedDict()

    def __getitem__(self, name: str) -> SourceModel:
        model = self._models.pop(name, None) or SourceModel()
        self._models[name] = model
        if len(self._models) > MAX_SOURCES:
            self._models.popitem(last=False)
        return model
