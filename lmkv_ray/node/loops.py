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


class _Step:
    """One step of a loop: an error is logged, and the pause after it grows, which also bounds the
    rate of the log.

    Args:
        what: the step in words, for the log.
        step: does what there is to do.
        period: seconds that the first pause after an error exceeds.
    """

    def __init__(self, what: str, step: Callable[[], Awaitable[None]], period: float) -> None:
        self._what = what
        self._step = step
        self._pause = self._period = period

    async def take(self) -> float:
        """Do it; how many seconds to pause for an error, 0 if there was none."""
        try:
            await self._step()
        except Exception:
            self._pause = min(max(2 * self._pause, 0.1), LONGEST_PAUSE)
            logger.exception("lmkv_ray: %s failed; again in %.1f s", self._what, self._pause)
            return self._pause
        self._pause = self._period
        return 0.0


async def every(
    period: float, what: str, step: Callable[[], Awaitable[None]], clock: Clock
) -> None:
    """Run ``step`` every ``period`` seconds until cancelled; after an error less often.

    Args:
        period: seconds between two steps.
        what: the step in words, for the log.
        step: does what there is to do.
        clock: the machine's.
    """
    work = _Step(what, step, period)
    while True:
        await clock.sleep(await work.take() or period)


async def whenever(
    alarm: Alarm,
    what: str,
    step: Callable[[], Awaitable[None]],
    clock: Clock,
    seconds: tuple[float, float],
) -> None:
    """Run ``step`` whenever the alarm has rung, until cancelled; after an error less often.

    Args:
        alarm: rings when there is something to do.
        what: the step in words, for the log.
        step: does what there is to do.
        clock: the machine's.
        seconds: between two steps: at least, however often the alarm rings, so that what comes
            meanwhile is done together; and at most, though it has not rung.
    """
    least, most = seconds
    work = _Step(what, step, most)
    while True:
        if pause := await work.take():
            await clock.sleep(pause)
        else:
            await clock.sleep(least)
            await alarm.wait(most - least)


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
