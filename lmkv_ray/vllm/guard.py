"""The engine never fails because of the cache: an error of ours ends here, as a miss."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D")


def never_raises(default: D) -> Callable[[Callable[P, R]], Callable[P, R | D]]:
    """Answer ``default`` instead of raising; a function's first error is logged, the rest not."""

    def decorate(function: Callable[P, R]) -> Callable[P, R | D]:
        logged = False

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R | D:
            nonlocal logged
            try:
                return function(*args, **kwargs)
            except Exception:
                if not logged:
                    logged = True
                    logger.exception("lmkv_ray: %s failed; going on without", function.__name__)
                return default

        return guarded

    return decorate
