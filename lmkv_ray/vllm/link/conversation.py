"""What an engine and a shard say to each other, as a state machine without I/O.

``ShardLink`` says it on a thread, through the courier; the simulation says it through a network of
its own (``tests/simulation/engine.py``). The order is: ``hello``, ``welcomed``, and then any number
of ``exchange``, ``answered`` or ``failed``; on any error it begins again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from lmkv_ray.messages import (
    Exchange,
    ExchangeReply,
    Hello,
    Welcome,
    decode,
    encode,
    encode_exchange,
)
from lmkv_ray.vllm.link.device_watch import DeviceWatch
from lmkv_ray.vllm.link.slots import News, Slots


class Conversation:
    """One engine's side of the conversation with one shard.

    Args:
        hello: what the engine says of itself; the slots it holds are filled in here.
        slots: the slots that it may fill.
        heartbeat: seconds after which the shard hears of an engine that has nothing to say but
            which chunks it used.
        maps: whether the shard is on this node.
        device: what the shard is told of the engine's own prefix cache, if anything.
        monotonic: tells the time of this machine in seconds.
    """

    def __init__(
        self,
        hello: Hello,
        slots: Slots,
        heartbeat: float,
        *,
        maps: bool = True,
        device: DeviceWatch | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = slots
        self.peers = 0
        """Other nodes and tiers that hold chunks."""
        self.differs: list[str] = []
        """Fields of the namespace in which engines of this model's name differ from this one."""
        self._hello = hello
        self._space, self._fields = hello.space, hello.fields
        self._heartbeat = heartbeat
        self._maps = maps
        self._device = device
        self._monotonic = monotonic
        self._said = hello
        self._said_at = 0.0
        self._number = 0
        self._told_at = 0.0

    @property
    def engine_id(self) -> str:
        """The engine's id, as the shard knows it."""
        return self._hello.engine_id

    @property
    def slot_bytes(self) -> int:
        """Bytes of one chunk."""
        return self._hello.slot_bytes

    @property
    def model(self) -> str:
        """What people call the model."""
        return self._hello.model

    def rename(self, space: int, fields: dict[str, str]) -> None:
        """From now on chunks are committed in another space; a new ``hello`` is due.

        Args:
            space: the new one.
            fields: the fields of its namespace, for people.
        """
        self._fields = fields
        self._space = space
        self.slots.start_over()

    @property
    def hello_is_due(self) -> bool:
        """Whether the shard knows another space than the engine commits in."""
        return self._hello.space != self._space

    def hello(self) -> bytes:
        """The message by which the engine attaches, or does so again."""
        if self.hello_is_due:
            self.slots.return_free()  # they may have been granted since ``rename``
            self._hello = msgspec.structs.replace(
                self._hello, fields=self._fields, space=self._space
            )
        self._said_at = self._monotonic()
        number = max(int(self._said_at * 1e9), self._said.attachment + 1)
        self._said = msgspec.structs.replace(self._hello, held=self.slots.held(), attachment=number)
        return encode(self._said)

    def welcomed(self, answer: bytes) -> Welcome:
        """The shard's answer to ``hello``; the caller maps the arena, and calls ``attached``."""
        return decode(answer, Welcome)

    def attached(self, welcome: Welcome) -> None:
        """The arena is mapped: what the shard has granted may be filled."""
        # For a shard on another node this only bounds how far its clock is ahead of ours.
        ahead = 0.0 if self._maps else welcome.clock - self._said_at
        self.slots.welcomed(welcome.arena_id, welcome.grant, ahead)
        self.peers = welcome.peers
        if self._device is not None:
            self._device.start_over()
        self._number = self._said.attachment
        self._told_at = -self._heartbeat  # at once: it wants slots

    @property
    def exchange_is_due(self) -> bool:
        """Whether there is something to say, or the shard should hear of the engine again."""
        return self.slots.has_news or self.quiet_for <= 0

    @property
    def quiet_for(self) -> float:
        """Seconds until there is something to say, if nothing happens."""
        heartbeat = self._told_at + self._heartbeat - self._monotonic()
        return min(heartbeat, self.slots.expires_in)

    def exchange(self) -> tuple[bytes, News]:
        """All there is to say; to be followed by ``answered`` or ``failed``.

        If it gets lost nothing is said again: slots that the next ``hello`` does not list as held
        are the shard's, whether or not it saw the commits.
        """
        news = self.slots.news()
        added, removed = self._device.news() if self._device is not None else (b"", b"")
        message = Exchange(
            engine_id=self._hello.engine_id,
            attachment=self._number,
            commits=news.commits,
            released=news.released,
            touched=b"".join(news.touched),
            want=news.want,
            device_added=added,
            device_removed=removed,
        )
        return encode_exchange(message), news

    def failed(self, news: News) -> None:
        """No answer has come."""
        self.slots.told(news)

    def answered(self, news: News, answer: bytes) -> None:
        """The shard's answer to an ``exchange``.

        Raises:
            ConnectionError: the shard does not know this engine (any more).
            msgspec.ValidationError: this is no answer.
        """
        self.slots.told(news)
        reply = decode(answer, ExchangeReply)
        self.peers, self.differs = reply.peers, reply.differs
        self._told_at = self._monotonic()
        if not reply.known:
            raise ConnectionError("the shard does not know this engine (any more)")
        if reply.refused:  # the grant was overtaken by a clear, or by its deadline
            self.slots.return_free()
        if reply.grant is not None:
            self.slots.granted(reply.grant)
