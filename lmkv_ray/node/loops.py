"""Background loops of services, which must not end."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from lmkv_ray.clock import Clock

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 10.0


async def forever(
    what: str, period: float, step: Callable[[], Awaitable[None]], clock: Clock
) -> None:
    """Run ``step`` every ``period`` seconds until cancelled; after an error too, less often.

    The growing pause also bounds the rate of the log.
    """
    pause = period
    while True:
        try:
            await step()
            pause = period
        except Exception:
            pause = min(max(2 * pause, 0.1), LONGEST_PAUSE)
            logger.exception("lmkv_ray: %s failed; again in %.1f s", what, pause)
        await clock.sleep(pause)


async def until(
    pauses: tuple[float, float], attempt: Callable[[], Awaitable[bool]], clock: Clock
) -> None:
    """Run ``attempt`` after growing pauses until it says that it worked.

    Args:
        pauses: the first and the longest, in seconds.
        attempt: an error counts as a failure.
        clock: the machine's.
    """
    pause, longest = pauses
    while True:
        await clock.sleep(pause)
        pause = min(2 * pause, longest)
        try:
            if await attempt():
                return
        except Exception:
            logger.exception("lmkv_ray: an attempt failed; again in %.1f s", pause)
