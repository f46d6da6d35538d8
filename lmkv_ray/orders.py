"""What the services of a cache ask of each other, beyond what engines ask (``messages``)."""

from __future__ import annotations

from lmkv_ray.messages import Message


class Offer(Message, frozen=True):
    """What a shard says of itself for one transport."""

    address: bytes = b""
    """What a reader needs to know; only the transport understands it."""
    obstacle: str | None = None
    """Why readers cannot use this transport to the shard now; None: it is possible."""


class PeerAddress(Message, frozen=True):
    """Shard to shard: how to be read from."""

    node_id: str
    host: str
    """See ``host.host_id``."""
    arena_id: int
    offers: dict[str, Offer]
    """By the name of the transport."""


class Take(Message, frozen=True):
    """Shard to shard: fetch these chunks from me, because I leave, or for there to be more copies.

    Answered by ``Taken`` when all are there, no more can come, or the time is over.
    """

    node_id: str
    """Whom to fetch from."""
    space: int
    slot_bytes: int
    pinned: bool
    """Whether they are pinned here, and shall be there."""
    keys: bytes
    within: float
    """Seconds."""
    cleared: int = 0
    """The last clear that the sender has carried out: a node that has carried out a later one takes
    nothing, because the sender may hold what was cleared."""


class Taken(Message, frozen=True):
    """Which chunks of a ``Take`` are there now."""

    keys: bytes


class Drain(Message, frozen=True):
    """To a shard: hand over what no other node holds; the node is about to leave."""

    within: float
    """Seconds."""


class Drained(Message, frozen=True):
    """What became of a node's chunks."""

    copied: int
    """Chunks that other nodes have taken over."""
    left: int
    """Chunks that only this node holds, as far as the directory knows."""


class Move(Message, frozen=True):
    """To a shard: move these chunks, as far as they are in its memory."""

    keys: bytes
    to: str
    """A node's id, or the name of a tier."""
    within: float
    """Seconds."""
