"""Which request may ask the store next: a few at a time, and requests take turns. No I/O."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A semaphore that is fair between requests, however much each of them asks.

    Args:
        slots: how many may be inside at a time.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: dict[object, deque[asyncio.Future[None]]] = {}
        """By request; the request whose turn is next comes first."""

    @asynccontextmanager
    async def turn(self, request: object) -> AsyncIterator[None]:
        """Be inside, once it is this request's turn.

        Args:
            request: the same object for all that one request asks.
        """
        if self._free:
            self._free -= 1
        else:
            await self._wait(request)
        try:
            yield
        finally:
            self._next()

    async def _wait(self, request: object) -> None:
        called = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(request, deque()).append(called)
        try:
            await called
        except asyncio.CancelledError:
            if called.done() and not called.cancelled():  # called, and does not want any more
                self._next()
            raise

    def _next(self) -> None:
        """Let the first of the next request in, if it still waits."""
        while self._waiting:
            request, waiting = next(iter(self._waiting.items()))
            del self._waiting[request]
            called = waiting.popleft()
            if waiting:
                self._waiting[request] = waiting  # behind all others
            if not called.done():
                called.set_result(None)
                return
        self._free += 1
