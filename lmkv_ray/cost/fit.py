"""Least squares, online."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SANE = (1e-9, 1e9)
"""Values outside are no measurements."""


class LinearFit:
    """``y = w . x`` with ``w, x >= 0``, fitted to the latest observations.

    Weighted least squares in information form with exponential forgetting (Ljung, System
    Identification, 2nd ed., 11.2): an observation counts half after ``half_life`` further ones, and
    errors count relative to what the prior expects. What the observations leave open keeps the
    proportions of the prior (a ridge, Hoerl and Kennard 1970, towards the prior times the typical
    ratio of y to it).

    Args:
        prior: the first guess of ``w``; positive.
        half_life: observations.
    """

    def __init__(self, prior: Sequence[float], *, half_life: float = 64.0) -> None:
        self.observations = 0
        self._prior = np.array(prior, np.float64)
        self._keep = 0.5 ** (1 / half_life)
        self._information = np.zeros((len(prior), len(prior)))
        self._moment = np.zeros(len(prior))
        self._count = 0.0
        self._log_ratio = 0.0
        self._weights = np.ones(len(prior))  # in units of the prior

    def observe(self, x: Sequence[float], y: float) -> None:
        """It was ``y`` at ``x``; what cannot be is ignored."""
        terms = np.array(x, np.float64) * self._prior
        expected = float(terms.sum())
        if not (SANE[0] < y < SANE[1] and SANE[0] < expected < SANE[1] and terms.min() >= 0):
            return
        self.observations += 1
        self._count = self._keep * self._count + 1
        self._log_ratio += (float(np.log(y / expected)) - self._log_ratio) / self._count
        row = terms / expected
        self._information = self._keep * self._information + np.outer(row, row)
        self._moment = self._keep * self._moment + row * (y / expected)
        self._weights = self._solve()

    def predict(self, x: npt.ArrayLike) -> Floats:
        """``w . x`` over the last dimension of ``x``; shape of ``x`` without it."""
        result: Floats = (np.asarray(x, np.float64) * self._prior) @ self._weights
        return result

    def _solve(self) -> Floats:
        """Nonnegative weights: those that come out negative are left out, worst first."""
        typical = np.exp(self._log_ratio)
        ridge = self._information.diagonal() / (1 + self._count) + 1e-12
        matrix = self._information + np.diag(ridge)
        moment = self._moment + ridge * typical
        active = list(range(len(matrix)))
        weights = np.zeros(len(matrix))
        while active:
            part = np.linalg.solve(matrix[np.ix_(active, active)], moment[active])
            if (part >= 0).all():
                weights[active] = part
                break
            del active[int(part.argmin())]
        return weights
