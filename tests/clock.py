"""A clock for tests of one service: time passes only while that service sleeps."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


class FakeClock:
    """See ``lmkv_ray.clock.Clock``."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], object]] = {}
        """What happens when."""

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1e9 + self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.at if when <= self.now]:
            self.at.pop(when)()
        await asyncio.sleep(0)

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)
