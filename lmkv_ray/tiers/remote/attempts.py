"""Asking the store for something, and leaving it alone for a while when it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from lmkv_ray.clock import Clock
from lmkv_ray.tiers.breaker import Breaker
from lmkv_ray.tiers.counters import TierCounters
from lmkv_ray.tiers.remote.objects import TooLargeError

logger = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_SECONDS = 1.0
"""A store that takes longer is out of use for a while."""


class Attempts:
    """All that is asked of one store.

    Args:
        counters: the tier's counters, raised here.
        problem_of: says what an error of the store means.
        failed: called after a failure that puts the store out of use.
        clock: the machine's time and chance.
    """

    def __init__(
        self,
        counters: TierCounters,
        problem_of: Callable[[Exception], str],
        failed: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._counters = counters
        self._problem_of = problem_of
        self._failed = failed
        self._breaker = Breaker()

    @property
    def problem(self) -> str | None:
        """Why the last attempt failed, and what to do."""
        return self._breaker.problem

    @property
    def usable(self) -> bool:
        """Whether the store may be asked now."""
        return self._breaker.over(self._clock.monotonic())

    @property
    def pause(self) -> float:
        """Seconds until it may be asked."""
        return self._breaker.left(self._clock.monotonic())

    async def __call__(
        self, call: Coroutine[Any, Any, T], within: float = PATIENCE_SECONDS
    ) -> T | Exception:
        """The result of a call, or what it raised.

        Args:
            call: what to do.
            within: seconds it was given: too few, and lateness says nothing about the store.
        """
        try:
            result = await call
        except (FileNotFoundError, TooLargeError) as error:
            self._breaker.worked()
            return error
        except Exception as error:
            hurried = isinstance(error, TimeoutError) and within < PATIENCE_SECONDS
            problem = self._problem_of(error)
            if not hurried:
                if self._breaker.failed(problem, self._clock.monotonic()):
                    self._counters.troubles += 1
                    logger.warning("lmkv_ray: %s", problem)
                self._failed()
            return error
        self._breaker.worked()
        return result
