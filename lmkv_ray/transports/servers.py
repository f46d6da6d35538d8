"""The ends of all transports at the shard that is read from."""

from __future__ import annotations

from collections.abc import Sequence

from lmkv_ray.errors import TransportError
from lmkv_ray.orders import Offer
from lmkv_ray.transports.base import Answer, Server


class Servers:
    """Says how this shard can be read from, and answers those that read.

    Args:
        known: one for each transport.
    """

    def __init__(self, known: Sequence[Server]) -> None:
        self._servers = {server.name: server for server in known}

    def offers(self, reader: str) -> dict[str, Offer]:
        """What a shard must know that is going to read; see ``Server.offer``."""
        return {name: server.offer(reader) for name, server in self._servers.items()}

    async def answer(self, name: str, question: bytes) -> Answer:
        """Answer the other end of a transport.

        Raises:
            TransportError: there is no such transport here, or it cannot answer.
        """
        server = self._servers.get(name)
        if server is None:
            raise TransportError(
                f"This shard has no transport {name[:40]!r}.",
                next_step="run the same version of lmkv_ray on all nodes.",
            )
        return await server.answer(question)
