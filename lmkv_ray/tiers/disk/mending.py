"""A disk in trouble is left alone, and tried again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from lmkv_ray.clock import Clock
from lmkv_ray.tiers.disk.counters import DiskCounters
from lmkv_ray.tiers.disk.health import Health, Trouble

logger = logging.getLogger(__name__)


class Mending:
    """What is done about trouble.

    Args:
        path: of the tier, for the log.
        health: of the medium.
        counters: of the tier.
        try_again: does what the trouble asks for; what is still in the way.
        mended: called when it works again.
        closing: set when there is no point any more.
        clock: of the machine.
    """

    def __init__(
        self,
        path: Path,
        health: Health,
        counters: DiskCounters,
        try_again: Callable[[Trouble], Awaitable[Exception | None]],
        mended: Callable[[], object],
        closing: asyncio.Event,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self.task: asyncio.Task[None] | None = None
        self._path = path
        self._health = health
        self._counters = counters
        self._try_again = try_again
        self._mended = mended
        self._closing = closing

    def failed(self, error: Exception) -> None:
        """The disk is in trouble: out of use until an attempt has succeeded."""
        if self._closing.is_set() or not self._health.failed(error, self._clock.monotonic()):
            return
        self._counters.troubles += 1
        logger.warning("lmkv_ray: disk tier %s: %s", self._path, self._health.problem)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._mend())

    async def _mend(self) -> None:
        """Try again, with growing pauses, until the disk works."""
        health = self._health
        while health.trouble is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), health.pause)
            if self._closing.is_set():
                return
            error = await self._try_again(health.trouble)
            if error is None:
                health.mended(self._clock.monotonic())
                logger.info("lmkv_ray: disk tier %s is in use again", self._path)
                self._mended()
            else:
                health.still(error)
