"""The other services of a cache, and its memory, as each service sees them.

The Ray actors implement this with named actors (``actors/named.py``), the simulation with a
network of its own (``tests/simulation``).
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol


class Neighbour(Protocol):
    """Another service, known by its name: it may be dead, restarting, or a new one by now."""

    async def ask(self, method: str, *arguments: object, within: float) -> bytes | None:
        """Call a method of the service.

        Args:
            method: its name.
            arguments: the method's arguments.
            within: seconds until the call is given up.

        Returns:
            the answer; None if none came in time.
        """
        ...

    def call(self, method: str, *arguments: object) -> Awaitable[Any]:
        """Call a method whose answer may be large (chunks). The caller sets a deadline.

        The awaitable raises if the service is not there or its method failed.
        """
        ...


class ClusterMemory(Protocol):
    """A few bytes that outlive every service of the cache, as long as the cluster lives."""

    async def load(self) -> bytes | None:
        """What was saved last; None if nothing was.

        Raises:
            OSError: the memory cannot be read now.
        """
        ...

    async def save(self, data: bytes) -> None:
        """Keep these bytes instead of those before.

        Raises:
            OSError: the memory cannot be written now.
        """
        ...


class Neighbours(Protocol):
    """The way to every service of the cache."""

    def shard(self, node_id: str) -> Neighbour:
        """The shard of a node."""
        ...

    def part(self, number: int) -> Neighbour:
        """A part of the directory; part 0 orders clears and keeps the services running."""
        ...

    def forget(self, node_id: str) -> None:
        """The shard of this node did not do what it said: look for it anew next time."""
        ...
