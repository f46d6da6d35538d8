"""What engines, shards and the directory say to each other.

Messages are msgspec structs, sent as msgpack bytes (never pickled). An engine talks to the shard of
its node (if its workers are on several, of each); shards talk to the directory and to each other.
Times on one node are
``time.monotonic()`` seconds (one clock for all processes of a host, untouched by clock jumps);
times that cross nodes are durations.
"""

from __future__ import annotations

import contextlib
import enum
from typing import TypeVar

import msgspec

from lmkv_ray.hints import NO_HINTS, Hints


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Base of all messages."""


class MissReason(enum.StrEnum):
    """Why tokens of a prompt were computed and not loaded. Every missed token has one."""

    NEVER_STORED = "never_stored"
    """No shard that was asked has ever held the chunk (as far as it remembers)."""
    EVICTED = "evicted"
    """The chunk was stored on this node and made room for others."""
    CLEARED = "cleared"
    """The chunk was removed by a user's clear or reset."""
    SAVE_DROPPED = "save_dropped"
    """This engine computed the chunk before, but could not save it (no free slot or time)."""
    STAGE_TIMEOUT = "stage_timeout"
    """Another node may hold the chunk, but it did not arrive before the deadline."""
    FETCH_FAILED = "fetch_failed"
    """Another node was said to hold the chunk, but could not deliver it intact."""
    CHEAPER_TO_COMPUTE = "cheaper_to_compute"
    """A lower tier or another node holds the chunk, but fetching it was expected to take longer."""
    LOAD_FAILED = "load_failed"
    """The chunk was replaced while it was copied, or the copy failed."""
    IDENTITY_PENDING = "identity_pending"
    """The engine does not know yet which weights it has, or is about to check them."""
    OTHER_NAMESPACE = "other_namespace"
    """Never stored as this engine computes it: engines of this model's name are attached that share
    nothing with it (its log and ``lmkv status`` say in which fields they differ)."""
    DETACHED = "detached"
    """The engine is not attached to a shard (starting, or the shard is down)."""
    NOT_READ = "not_read"
    """The request must compute every token, as for log probabilities of its prompt, or pooling."""
    COMPOSED = "composed"
    """Computed on top of text that is reused anywhere in the prompt: such KV is never stored."""
    TAIL = "tail"
    """The prompt's end, shorter than one chunk: never stored by design."""


class Owner(Message, frozen=True, kw_only=True, array_like=True):
    """A process, and if it holds slots, as which engine."""

    pid: int
    start: int
    """Start time in clock ticks since boot, so that a reused pid is another owner."""
    engine: int = 0
    """A number for the engine's id, as the shard counts them; 0: the process itself. One process
    may be several engines."""


class Grant(Message, frozen=True, kw_only=True, array_like=True):
    """Free slots an engine may fill until ``deadline``."""

    slots: list[int]
    deadline: float
    """``time.monotonic()`` seconds; after it the engine must not begin to write."""


class Kin(Message, frozen=True, kw_only=True, array_like=True):
    """What is told of an engine to others that serve a model of the same name."""

    model: str
    space: int
    """Of its namespace; 0: not known yet."""
    fields: dict[str, str]
    """Of its namespace, as short texts (``Namespace.fields``)."""


class Hello(Message, frozen=True, kw_only=True, array_like=True):
    """Engine to shard: attach. Sent again, with the same id, whenever the shard restarted."""

    engine_id: str
    owner: Owner
    """The process whose slots they are."""
    space: int
    """Of the engine's namespace (see ``tenants``); 0: not known yet. An engine whose
    namespace changes says hello again; what it fills of the old one is refused from then on."""
    model: str
    """What people call the model; for status pages only."""
    slot_bytes: int
    """Bytes of one chunk."""
    held: list[int]
    """All slots that this engine holds, also of grants of the shard's predecessor."""
    writers: list[Owner] = []
    """Other processes that may write into them: a reservation ends with the last one."""
    attachment: int = 0
    """A number for this message, higher than in all before it: what was sent before counts no more
    once it has arrived."""
    fields: dict[str, str] = {}
    """Of the engine's namespace, once it is known (``Namespace.fields``)."""


class Welcome(Message, frozen=True, kw_only=True, array_like=True):
    """Shard to engine: the answer to ``Hello``."""

    arena_path: str
    arena_id: int
    """Changes when the arena is a new one (its predecessor's bytes are gone)."""
    node_id: str
    grant: Grant
    """New slots, and those of ``held`` that the shard still recognises."""
    peers: int
    """Number of sources outside the arena that hold chunks; 0: staging is pointless."""
    clock: float
    """The shard's ``time.monotonic()``: an engine on another node compares it with its own."""


class Commit(Message, frozen=True, kw_only=True, array_like=True):
    """A filled slot, to be made visible under ``key``."""

    slot: int
    key: bytes
    nbytes: int
    hints: Hints = NO_HINTS


class Exchange(Message, frozen=True, kw_only=True, array_like=True):
    """Engine to shard, a few times a second and when slots run low: everything that piled up."""

    engine_id: str
    attachment: int = 0
    """Of the ``Hello`` that it follows; after another one it says nothing."""
    commits: list[Commit] = []
    released: list[int] = []
    """Granted slots given back unwritten (or written too late)."""
    touched: bytes = b""
    """Keys that were hit, deepest chunk of a prompt first, 16 bytes each."""
    want: int = 0
    """Free slots the engine would like to be granted now."""
    device_added: bytes = b""
    """Keys of chunks that its own prefix cache holds now (maybe told before), 16 bytes each."""
    device_removed: bytes = b""
    """Of those that it does not hold any more. A new ``Hello`` forgets them all."""


class ExchangeReply(Message, frozen=True, kw_only=True, array_like=True):
    """Shard to engine: the answer to ``Exchange``."""

    known: bool = True
    """False: the shard restarted or gave the engine up; say ``Hello`` again."""
    grant: Grant | None = None
    refused: list[int] = []
    """Committed slots that were not accepted (grant expired); they belong to the shard again."""
    peers: int = 0
    differs: list[str] = []
    """Fields of the namespace in which engines of this model's name differ from this one."""


class Stage(Message, frozen=True, kw_only=True, array_like=True):
    """Engine to shard: bring these chunks into the arena from wherever they are."""

    engine_id: str
    keys: bytes
    """A run of chunks of one prompt, first chunk first."""
    slot_bytes: int
    within: float
    """Seconds after which the engine will not care any more."""
    remaining: list[float] = []
    """Seconds the engine expects to compute once the first k chunks are here, for k = 0 to all of
    them; empty: it wants them whatever they cost."""
    locate: bool = False
    """Whether the answer shall say where the chunks are: the engine does not map this arena."""
    space: int = 0
    """Of the tenant whose request it is; else of the engine's namespace."""


class StageReply(Message, frozen=True, kw_only=True, array_like=True):
    """Shard to engine, when a ``Stage`` is over: how far it came, and why no further."""

    ready: int
    """Leading keys of the request that are now in the arena."""
    reason: MissReason | None
    """Why the first missing key is not ready here; None if all keys are ready."""
    arena_id: int = 0
    """Id of the arena of ``slots`` and ``generations``; 0 if these were not asked for."""
    slots: list[int] = []
    """Slot of each key; -1: the arena does not hold it. A slot may be given away at any time: a
    copy is valid if its generation is unchanged afterwards."""
    generations: list[int] = []


class DeviceDelta(Message, frozen=True, kw_only=True, array_like=True):
    """Part of a ``Delta``: what changed in the prefix cache of one engine."""

    engine_id: str
    added: bytes
    removed: bytes


class Delta(Message, frozen=True, kw_only=True, array_like=True):
    """Shard to one part of the directory: what changed in a shard since the last delta.

    Deltas of one (node, epoch, part) are numbered without gaps. On a gap or a new epoch the part
    answers ``resync`` and the shard sends its whole content, as a run of deltas of which the first
    has ``begin`` set and the last one ``end``; each names a piece of the content as added, besides
    what changed meanwhile.
    """

    node_id: str
    epoch: int
    """One per life of the shard process; larger for a later life."""
    seq: int
    added: bytes
    removed: bytes
    begin: bool = False
    end: bool = False
    cleared: int = 0
    """The last clear that the shard has carried out."""
    room: int = 0
    """Bytes of other nodes' chunks that it would take."""
    draining: bool = False
    """The node is about to leave."""
    engines: int = 0
    """Engines that are attached."""
    kin: list[Kin] = []
    """One of each namespace of the engines that are attached; to part 0 only."""
    devices: list[DeviceDelta] = []
    """What engines hold on their devices. An engine that is gone holds nothing any more."""


class Clear(Message, frozen=True, kw_only=True, array_like=True):
    """Directory to shard: remove chunks. Clears are numbered, later ones higher."""

    number: int
    space: bytes = b""
    """8 bytes, little endian (see ``tenants``); none: all spaces."""


class Clears(Message, frozen=True, kw_only=True, array_like=True):
    """Directory to shard: what it has missed, in order; it passes over what it has done."""

    clears: list[Clear]


class ShardCleared(Message, frozen=True, kw_only=True, array_like=True):
    """A shard's answer to clears that it has carried out."""

    previous: int
    """The number of the last clear that the shard had carried out before these."""
    pending: list[str] = []
    """Names of tiers in which they wait for the medium: nothing of them is served from there."""


class ClearDone(Message, frozen=True, kw_only=True, array_like=True):
    """The directory's answer to a clear."""

    number: int
    """Of the clear."""
    pending: list[str] = []
    """Names of tiers in which some shard could not carry it out yet."""


class DeltaReply(Message, frozen=True, kw_only=True, array_like=True):
    """Directory to shard."""

    resync: bool
    peers: int
    """Other nodes that hold at least one chunk."""
    clears: list[Clear] = []
    """Clears that the shard has missed, in order."""
    kin: list[Kin] = []
    """Engines of other nodes that serve a model of a name that is served there too."""


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The message as msgpack bytes."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[M]) -> M:
    """A message from its bytes.

    Raises:
        msgspec.ValidationError: the bytes are not a ``kind``.
    """
    return msgspec.msgpack.decode(data, type=kind)


def encode_exchange(exchange: Exchange) -> bytes:
    """As ``encode``; a commit that cannot be sent is left out, and its slot given back."""
    try:
        return encode(exchange)
    except (ValueError, OverflowError, TypeError):
        pass
    good: list[Commit] = []
    released = list(exchange.released)
    for commit in exchange.commits:
        try:
            encode(commit)
            good.append(commit)
        except (ValueError, OverflowError, TypeError):
            released.append(commit.slot)
    return encode(msgspec.structs.replace(exchange, commits=good, released=released))


def decode_exchange(data: bytes) -> Exchange:
    """As ``decode``; a commit that cannot be read is left out, and its slot given back.

    Raises:
        msgspec.DecodeError: something else cannot be read.
    """
    try:
        return decode(data, Exchange)
    except ValueError:  # of a DecodeError, and of text that is none
        fields = msgspec.msgpack.decode(data, type=list[msgspec.Raw])
    at = Exchange.__struct_fields__.index("commits")
    commits = msgspec.msgpack.decode(fields[at], type=list[msgspec.Raw]) if at < len(fields) else []
    good: list[msgspec.Raw] = []
    released: list[int] = []
    for commit in commits:
        try:
            msgspec.msgpack.decode(commit, type=Commit)
            good.append(commit)
        except ValueError:
            with contextlib.suppress(ValueError, IndexError):
                first = msgspec.msgpack.decode(commit, type=list[msgspec.Raw])[0]
                released.append(msgspec.msgpack.decode(first, type=int))
    fields[at : at + 1] = [msgspec.Raw(msgspec.msgpack.encode(good))]
    exchange = msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Exchange)
    return msgspec.structs.replace(exchange, released=[*exchange.released, *released])
