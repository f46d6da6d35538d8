"""Time and chance, handed to the code that needs them.

No file of ``node``, ``shard``, ``directory``, ``tiers`` and ``transports`` reads the system's
clock, sleeps or draws random numbers by itself (``make lint`` refuses it). So a whole cluster can
run in one process under simulated time, from one seed (``tests/simulation``).
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Protocol


class Clock(Protocol):
    """Time and chance as one machine has them."""

    def monotonic(self) -> float:
        """Seconds since some moment, the same for all processes of a machine; never goes back."""
        ...

    def wall(self) -> float:
        """Seconds since 1970. It may jump, and differs from machine to machine."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let this task wait."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """Bytes that cannot be predicted."""
        ...


class SystemClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        """See ``Clock``."""
        return time.monotonic()

    def wall(self) -> float:
        """See ``Clock``."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """See ``Clock``."""
        await asyncio.sleep(seconds)

    def random_bytes(self, count: int) -> bytes:
        """See ``Clock``."""
        return os.urandom(count)


SYSTEM_CLOCK = SystemClock()
