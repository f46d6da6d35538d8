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
SLOT_ROW = 2
"""Numbers of a row of ``Bring``: offset here, bytes there is room for; uint64 each."""
BRING_MOST = 2048
"""Keys of one ``Bring``."""


class Tables(Message, frozen=True):
    """Where the tables of a peer's arena are (see ``DistantArena``)."""

    capacity: int
    extent_bytes: int
    slot_bytes: bytes
    """int64[extents]: of its registered extents, 0 for others."""
    index: int
    slots: int
    data: int


class Register(Message, frozen=True, tag=True):
    """Make extents of the arena, and the tables, readable for peers."""

    extents: list[int]


class Meet(Message, frozen=True, tag=True):
    """Get to know a peer's agent, or news of it."""

    agent: str
    metadata: bytes
    replaces: str
    """An agent that is no more, if it is known; else empty."""
    tables: Tables


class Read(Message, frozen=True, tag=True):
    """Read from known places of a peer into slots, and verify what has arrived there."""

    agent: str
    rows: bytes
    """uint64[n, ROW]."""


class Bring(Message, frozen=True, tag=True):
    """Look chunks up in a peer's tables, and read those that are found, as ``Read`` does."""

    agent: str
    keys: bytes
    """At most ``BRING_MOST``, 16 bytes each."""
    slots: bytes
    """uint64[n, SLOT_ROW]."""


class Serve(Message, frozen=True, tag=True):
    """A peer is about to read: attend to it. Not answered."""


Command = Register | Meet | Read | Bring


class Request(Message, frozen=True):
    """Shard to process."""

    number: int
    command: Command | Serve


class Ready(Message, frozen=True, tag=True):
    """The first answer: the agent's name, new in each life, and where it has mapped the arena."""

    agent: str
    data: int
    index: int
    slots: int


class Registered(Message, frozen=True, tag=True):
    """All that was registered so far, for peers to load."""

    metadata: bytes


class Met(Message, frozen=True, tag=True):
    """The peer can be read from."""


class Arrived(Message, frozen=True, tag=True):
    """The chunks are in their slots, and nothing writes there any more."""

    intact: bytes
    """For each row: 1 if the bytes have the checksum, else 0."""


class Brought(Message, frozen=True, tag=True):
    """What the tables say; the arrays are those of ``Located``."""

    nbytes: bytes
    """0 where they do not say."""
    offsets: bytes
    generations: bytes
    checksums: bytes
    intact: bytes
    """As in ``Arrived``; 0 also for chunks that were not read."""
    seconds: float
    """What the first READ took."""


class Failed(Message, frozen=True, tag=True):
    """It did not work; nothing writes into the slots any more."""

    why: str


Result = Ready | Registered | Met | Arrived | Brought | Failed


class Answer(Message, frozen=True):
    """Process to shard."""

    number: int
    result: Result
