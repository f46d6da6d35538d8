"""The engine never fails because of the cache: an error of ours ends here, as a miss."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lmkv_ray.complaints import Complaints

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D")


class Swallowed:
    """How many errors ended here, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self) -> None:
        """One more."""
        with self._lock:
            self._count += 1

    def take(self) -> int:
        """How many since the last call."""
        with self._lock:
            count, self._count = self._count, 0
        return count


swallowed = Swallowed()
"""For the counter ``swallowed_errors``."""


def never_raises(default: D) -> Callable[[Callable[P, R]], Callable[P, R | D]]:
    """Answer ``default`` instead of raising; errors are counted, and of each function logged now
    and then.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R | D]:
        complaints = Complaints(logger)

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R | D:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                swallowed.add()
                complaints.say(f"{function.__qualname__} failed; going on without.", error=error)
                return default

        return guarded

    return decorate
