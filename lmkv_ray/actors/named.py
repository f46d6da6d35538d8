"""Other actors, by their names: each may be dead, restarting, or a new one by now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from ray.exceptions import RayError, RayTaskError

from lmkv_ray.actors.launch import Handle, find
from lmkv_ray.actors.names import directory_name, shard_name
from lmkv_ray.complaints import Complaints

logger = logging.getLogger(__name__)


FIND_SECONDS = 3.0
"""How long Ray's head may take to say where an actor is."""


class NamedActors:
    """The services of a cache, as actors of Ray. See ``Neighbours``.

    Args:
        namespace: the Ray namespace of the cache.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._shards: dict[str, NamedActor] = {}

    def shard(self, node_id: str) -> NamedActor:
        """See ``Neighbours``."""
        return self._shards.setdefault(node_id, NamedActor(shard_name(node_id), self._namespace))

    def part(self, number: int) -> NamedActor:
        """See ``Neighbours``."""
        return NamedActor(directory_name(number), self._namespace)

    def forget(self, node_id: str) -> None:
        """See ``Neighbours``."""
        actor = self._shards.get(node_id)
        if actor is not None and not actor.is_sought:  # else another thread would look for it
            del self._shards[node_id]


class NamedActor:
    """Every call ends in time, also when Ray's head hangs, whom a name has to be asked of.

    Args:
        name: the name of the actor.
        namespace: the Ray namespace of the cache.
    """

    def __init__(self, name: str, namespace: str) -> None:
        self._name = name
        self._namespace = namespace
        self._handle: Handle | None = None
        self._finding: asyncio.Task[Handle | None] | None = None
        self._complaints = Complaints(logger)

    @property
    def is_sought(self) -> bool:
        """Whether a thread still waits to be told where it is."""
        return self._finding is not None and not self._finding.done()

    async def handle(self, within: float) -> Handle | None:
        """The actor; None if there is none, or Ray did not say in time."""
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

    async def ask(self, method: str, *arguments: object, within: float) -> bytes | None:
        """See ``Neighbour``."""
        deadline = time.monotonic() + within
        handle = await self.handle(within)
        if handle is None:
            return None
        try:
            answer = getattr(handle, method).remote(*arguments)
            result: bytes = await asyncio.wait_for(answer, max(deadline - time.monotonic(), 0))
            return result
        except RayTaskError as error:
            # The actor's own code raised: a fault of the program, at every call perhaps.
            self._complaints.say(f"{method} of {self._name} failed: {error}")
        except (TimeoutError, RayError):
            pass
        self._handle = None  # the actor may have ended, and a new one may have its name
        return None

    async def call(self, method: str, *arguments: object) -> Any:
        """See ``Neighbour``. What the actor's method returns lies in Ray's object store."""
        handle = await self.handle(FIND_SECONDS)
        if handle is None:
            raise LookupError(f"There is no actor {self._name}.")
        return await getattr(handle, method).remote(*arguments)


def _ignore_error(task: asyncio.Task[Handle | None]) -> None:
    """Take the error of a call whose caller may have stopped waiting."""
    if not task.cancelled():
        task.exception()
