"""Which transport serves which peer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lmkv_ray.arena import ArenaWriter
from lmkv_ray.errors import TransportError
from lmkv_ray.transports.base import PeerInfo, Transport
from lmkv_ray.transports.nixl import Helper, NixlTransport
from lmkv_ray.transports.object_store import ObjectStoreTransport
from lmkv_ray.transports.shared_memory import SharedMemoryTransport

logger = logging.getLogger(__name__)


def all_transports(arena: ArenaWriter, helper: Helper) -> list[Transport]:
    """Those there are, best first.

    Args:
        arena: what is fetched into.
        helper: for NIXL to read into it.
    """
    return [SharedMemoryTransport(), NixlTransport(arena, helper), ObjectStoreTransport()]


class Transports:
    """Chooses a transport for each peer, once for each life of the peer's arena.

    Args:
        known: best first.
        setting: a transport's name, or ``auto`` for the first one that can serve the peer.
    """

    def __init__(self, known: Sequence[Transport], setting: str = "auto") -> None:
        self._transports = [t for t in known if setting in ("auto", t.name)]
        self._chosen: dict[str, tuple[int, Transport]] = {}
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
        known = self._chosen.get(peer.node_id)
        if known is not None and known[0] == peer.arena_id:
            return known[1]
        obstacles: list[str] = []
        for transport in self._transports:
            obstacle = transport.obstacle(peer)
            if obstacle is None:
                why = "; ".join(obstacles) or "it is the best there is"
                logger.info("Fetching from node %s by %s: %s", peer.node_id, transport.name, why)
                self._chosen[peer.node_id] = peer.arena_id, transport
                return transport
            obstacles.append(f"not {transport.name}, as {obstacle}")
        raise TransportError(
            f"No transport reaches node {peer.node_id}: {'; '.join(obstacles)}.",
            next_step="set LMKV_TRANSPORT=auto.",
        )

    def forget(self, node_id: str) -> None:
        """The peer is gone, or its transport failed: choose anew next time."""
        self._chosen.pop(node_id, None)
