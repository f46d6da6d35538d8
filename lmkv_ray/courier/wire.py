"""What an engine and its courier say to each other, over a socket pair."""

from __future__ import annotations

from lmkv_ray.messages import Message


class Begin(Message, frozen=True, tag=True):
    """The first message; it has no answer."""

    settings: bytes
    """``Settings``, pickled: the socket has no other end than the engine's."""


class Find(Message, frozen=True, tag=True):
    """Join the Ray cluster, if that has not been done, and find a shard."""

    start: bool
    """Start the cache if there is none."""
    known: str
    """The cluster in which the engine found a shard last. In another one the cache is started too:
    no user has stopped it there. Empty: none."""
    host: str | None
    """``host_id`` of another node; None: this one."""


class Call(Message, frozen=True, tag=True):
    """Call a method of a shard that was found."""

    shard: int
    method: str
    payload: bytes


class FoundShard(Message, frozen=True, tag=True):
    """Answer to ``Find``."""

    shard: int
    """Its number in calls to this courier."""
    cluster: str
    """Where it is."""


class Reply(Message, frozen=True, tag=True):
    """Answer to ``Call``."""

    payload: bytes


class Failed(Message, frozen=True, tag=True):
    """What was asked for could not be done."""

    kind: str
    """Name of a class of ``lmkv_ray.errors``; empty: of another one."""
    what: str
    next_step: str = ""


Command = Begin | Find | Call
Result = FoundShard | Reply | Failed


class Request(Message, frozen=True):
    """Engine to courier."""

    number: int
    command: Command


class Answer(Message, frozen=True):
    """Courier to engine."""

    number: int
    """Of the request."""
    result: Result
