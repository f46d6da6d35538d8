"""What a shard and its NIXL processes say to each other, over a socket pair."""

from __future__ import annotations

from lmkv_ray.messages import Message

NAME = "nixl"
"""Of the transport, as in the setting."""
PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl_rocm")
"""Wheels of NIXL. The package ``nixl`` chooses among them by importing torch, which we need not."""
ROW = 4
"""Numbers of a row of ``Read``: offset here, offset there, bytes, checksum; uint64 each."""
AT_ONCE = 8
"""Commands under way at a time; more wait."""


class PeerData(Message, frozen=True):
    """Where the payloads of a peer's arena are, in the process that serves them."""

    address: int
    """Of the first payload."""
    extent_bytes: int
    """Bytes of an extent, each of which is registered by itself."""


class Register(Message, frozen=True, tag=True):
    """Make extents of the arena readable for peers."""

    extents: list[int]


class Meet(Message, frozen=True, tag=True):
    """Get to know a peer's agent, or news of it."""

    agent: str
    metadata: bytes
    replaces: str
    """An agent that is no more, if it is known; else empty."""
    data: PeerData


class Read(Message, frozen=True, tag=True):
    """Read from known offsets of a peer into slots, and verify what has arrived there."""

    agent: str
    rows: bytes
    """uint64[n, ROW]."""


class Serve(Message, frozen=True, tag=True):
    """A peer is about to read: attend to it. Not answered."""


Command = Register | Meet | Read


class HelperRequest(Message, frozen=True):
    """Shard to process."""

    number: int
    command: Command | Serve


class Ready(Message, frozen=True, tag=True):
    """The first answer: the agent, whose name is new in each life."""

    agent: str
    data: int
    """Address of the first payload."""


class Registered(Message, frozen=True, tag=True):
    """All that was registered so far, for peers to load."""

    metadata: bytes


class Met(Message, frozen=True, tag=True):
    """The peer can be read from."""


class Arrived(Message, frozen=True, tag=True):
    """The chunks are in their slots, and nothing writes there any more."""

    intact: bytes
    """For each row: 1 if the bytes have the checksum, else 0."""


class NotDone(Message, frozen=True, tag=True):
    """It did not work; nothing writes into the slots any more."""

    why: str


Result = Ready | Registered | Met | Arrived | NotDone


class HelperAnswer(Message, frozen=True):
    """Process to shard."""

    number: int
    result: Result
