"""Which transport serves which peer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lmkv_ray.arena import ArenaReader, ArenaWriter
from lmkv_ray.clock import Clock
from lmkv_ray.errors import TransportError
from lmkv_ray.transports.base import PeerInfo, Server, Transport
from lmkv_ray.transports.nixl import Helper, NixlServer, NixlTransport
from lmkv_ray.transports.object_store import ObjectStoreServer, ObjectStoreTransport
from lmkv_ray.transports.shared_memory import SharedMemoryServer, SharedMemoryTransport

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 60.0
"""After so long it is seen whether there is something better for a peer now."""


def all_transports(arena: ArenaWriter, helper: Helper, clock: Clock) -> list[Transport]:
    """Those there are, best first.

    Args:
        arena: what is fetched into.
        helper: for NIXL to read into it.
        clock: measures deadlines.
    """
    return [
        SharedMemoryTransport(clock),
        NixlTransport(arena, helper, clock),
        ObjectStoreTransport(clock),
    ]


def all_servers(
    reader: ArenaReader, arena: ArenaWriter, helper: Helper, clock: Clock
) -> list[Server]:
    """The other ends of the same transports.

    Args:
        reader: what is read from.
        arena: the same arena, where checksums are noted.
        helper: for NIXL to serve it.
        clock: measures deadlines.
    """
    return [
        SharedMemoryServer(arena.path),
        NixlServer(reader, helper, arena.set_checksum, clock),
        ObjectStoreServer(reader),
    ]


def _obstacle(transport: Transport, peer: PeerInfo) -> str | None:
    offer = peer.offers.get(transport.name)
    if offer is None:
        return "the peer does not offer it"
    if offer.obstacle is not None:
        return f"the peer says: {offer.obstacle}"
    return transport.obstacle(peer)


@dataclass(frozen=True)
class _Choice:
    arena_id: int
    transport: Transport
    at: float
    """Monotonic seconds of the clock."""
    is_best: bool


class Transports:
    """Chooses a transport for each peer, for as long as it works.

    Args:
        known: best first.
        setting: a transport's name, or ``auto`` for the first one that can serve the peer.
        clock: says when it is time to look for a better one.
    """

    def __init__(self, known: Sequence[Transport], setting: str, clock: Clock) -> None:
        self._clock = clock
        self._transports = [t for t in known if setting in ("auto", t.name)]
        self._chosen: dict[str, _Choice] = {}
        if not self._transports:
            raise TransportError(
                f"There is no transport {setting!r}.",
                next_step=f"set LMKV_TRANSPORT to auto or one of {[t.name for t in known]}.",
            )

    def choose(self, peer: PeerInfo) -> Transport:
        """The transport for a peer; logs it, and why, when it is new.

        Raises:
            TransportError: the setting names one that cannot serve this peer.
        """
        now, before = self._clock.monotonic(), self._chosen.get(peer.node_id)
        if before is not None and before.arena_id != peer.arena_id:
            before = None
        if before is not None and (before.is_best or now < before.at + AGAIN_SECONDS):
            return before.transport
        obstacles: list[str] = []
        for transport in self._transports:
            obstacle = _obstacle(transport, peer)
            if obstacle is None:
                if before is None or before.transport is not transport:
                    why = "; ".join(obstacles) or "it is the best there is"
                    name = transport.name
                    logger.info("Fetching from node %s by %s: %s", peer.node_id, name, why)
                choice = _Choice(peer.arena_id, transport, now, not obstacles)
                self._chosen[peer.node_id] = choice
                return transport
            obstacles.append(f"not {transport.name}, as {obstacle}")
        raise TransportError(
            f"No transport reaches node {peer.node_id}: {'; '.join(obstacles)}.",
            next_step="set LMKV_TRANSPORT=auto.",
        )

    def forget(self, node_id: str) -> None:
        """The peer is gone, or its transport failed: choose anew next time."""
        self._chosen.pop(node_id, None)
