"""Background loops of services, which must not end, and which wake for a reason."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lmkv_ray.clock import Clock

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 10.0


class Alarm:
    """Wakes a loop that has something to do."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """There is something to do. Cheap; as often as you like."""
        self._event.set()

    async def wait(self, seconds: float) -> None:
        """Return when the alarm has rung since the last wait, or after so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return
        self._event.clear()


async def forever(
    what: str,
    period: float,
    step: Callable[[], Awaitable[None]],
    clock: Clock,
    alarm: Alarm | None = None,
    least: float = 0.0,
) -> None:
    """Run ``step`` every ``period`` seconds until cancelled; after an error too, less often.

    The growing pause also bounds the rate of the log.

    Args:
        what: the step in words, for the log.
        period: seconds between two steps if nothing rings.
        step: does what there is to do.
        clock: the machine's.
        alarm: wakes the loop earlier.
        least: seconds between two steps, however often the alarm rings: what comes meanwhile is
            done together.
    """
    pause = period
    while True:
        try:
            await step()
            pause = period
        except Exception:
            pause = min(max(2 * pause, 0.1), LONGEST_PAUSE)
            logger.exception("lmkv_ray: %s failed; again in %.1f s", what, pause)
        if alarm is None or pause != period:
            await clock.sleep(pause)
        else:
            await clock.sleep(least)
            await alarm.wait(period - least)


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
