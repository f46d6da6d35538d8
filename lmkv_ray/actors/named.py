"""Another actor, by its name: it may be dead, restarting, or a new one by now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable

from ray.exceptions import RayError, RayTaskError

from lmkv_ray.actors.launch import Handle, find

logger = logging.getLogger(__name__)


class NamedActor:
    """Every call ends in time, also when Ray's head hangs, whom a name has to be asked of.

    Args:
        name: of the actor.
        namespace: Ray's.
    """

    def __init__(self, name: str, namespace: str) -> None:
        self._name = name
        self._namespace = namespace
        self._handle: Handle | None = None
        self._finding: asyncio.Task[Handle | None] | None = None
        self._complaint = ""

    @property
    def is_sought(self) -> bool:
        """Whether a thread still waits to be told where it is."""
        return self._finding is not None and not self._finding.done()

    async def handle(self, within: float) -> Handle | None:
        """The actor; None if there is none, or nobody could say in time."""
        if self._handle is None:
            if self._finding is None or self._finding.done():
                self._finding = asyncio.create_task(
                    asyncio.to_thread(find, self._name, self._namespace)
                )
                self._finding.add_done_callback(_ignore_error)
            # It goes on after we have given up, in one thread however many ask meanwhile.
            with contextlib.suppress(TimeoutError, RayError):
                self._handle = await asyncio.wait_for(asyncio.shield(self._finding), max(within, 0))
        return self._handle

    async def ask(self, method: str, *args: object, within: float) -> bytes | None:
        """The answer to a call, or None: there is none in time."""
        deadline = time.monotonic() + within
        handle = await self.handle(within)
        if handle is None:
            return None
        try:
            return await _answer(getattr(handle, method).remote(*args), deadline)
        except RayTaskError as error:
            self._complain(method, error)
        except (TimeoutError, RayError):
            pass
        self._handle = None  # maybe it was ended for good and there is a new one
        return None

    def _complain(self, method: str, error: RayTaskError) -> None:
        """Its code failed, and may do so at every call: say so once."""
        if str(error) != self._complaint:
            self._complaint = str(error)
            logger.warning("lmkv_ray: %s of %s failed: %s", method, self._name, error)


async def in_time(answer: Awaitable[bytes], within: float) -> bytes | None:
    """The answer of an actor, or None: it is dead, restarting, or too slow."""
    try:
        return await _answer(answer, time.monotonic() + within)
    except (TimeoutError, RayError):
        return None


async def _answer(answer: Awaitable[bytes], deadline: float) -> bytes:
    return await asyncio.wait_for(answer, max(deadline - time.monotonic(), 0))


def _ignore_error(task: asyncio.Task[Handle | None]) -> None:
    """Nobody may be waiting for it any more."""
    if not task.cancelled():
        task.exception()
