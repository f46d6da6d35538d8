"""A shard without RPCs, and an engine without a model, which moves made-up bytes."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from lmkv_ray.arena import ArenaReader, ArenaWriter, this_process
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.config import Settings
from lmkv_ray.keys import key_array
from lmkv_ray.messages import (
    Commit,
    Exchange,
    ExchangeReply,
    Hello,
    Owner,
    Stage,
    StageReply,
    Welcome,
    decode,
    decode_exchange,
    encode,
)
from lmkv_ray.node import ThisMachine
from lmkv_ray.node.directory import DirectoryClient
from lmkv_ray.node.peers import Peers
from lmkv_ray.node.shard import Shard

SPACE = 7
CHUNK_BYTES = 40_000
Call = Callable[[str, bytes], bytes]
MACHINE = ThisMachine("n", restarted=False)


def new_arena(settings: Settings, name: str = "test") -> ArenaWriter:
    """An arena of the capacity in the settings, with a name of its own."""
    assert settings.capacity is not None
    return ArenaWriter.create(f"{name}.{secrets.token_hex(4)}", int(settings.capacity))


class LocalShard(Shard):
    """Called as the actor is."""

    def __init__(self, writer: ArenaWriter, settings: Settings, node_id: str = "n") -> None:
        super().__init__(writer, settings, node_id, MACHINE)

    def call(self, method: str, message: bytes) -> bytes:
        if method == "exchange":
            return encode(self.exchange(decode_exchange(message)))
        grant = self.hello(decode(message, Hello))
        path, arena_id = self.writer.path, self.writer.arena_id
        return encode(
            Welcome(
                arena_path=path, arena_id=arena_id, node_id="n", grant=grant, peers=0, clock=0.0
            )
        )


class Silence:
    """Neighbours that never answer, and each of them."""

    def shard(self, node_id: str) -> Silence:
        return self

    def part(self, number: int) -> Silence:
        return self

    def forget(self, node_id: str) -> None:
        pass

    async def ask(self, method: str, *arguments: object, within: float) -> bytes | None:
        return None

    def call(self, method: str, *arguments: object) -> Awaitable[Any]:
        raise LookupError(method)


def no_directory() -> DirectoryClient:
    return DirectoryClient(Silence(), 1, SYSTEM_CLOCK)


def no_peers(node_id: str = "n") -> Peers:
    return Peers(Silence(), no_directory(), node_id, "host", SYSTEM_CLOCK)


def make_keys(n: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(16) for _ in range(n)]


def payload_of(key: bytes, nbytes: int = CHUNK_BYTES) -> bytes:
    """The bytes of a chunk, which follow from its key."""
    return np.random.default_rng(list(key)).bytes(nbytes)


class FakeEngine:
    """An engine without a model.

    Args:
        call: calls the shard: (method, message) -> answer.
        engine_id: the engine's id.
        owner: the process that owns its slots; default: this one.
        space: the space of its chunks.
        nbytes: size of a chunk.
        writers: processes that may write into its slots.
    """

    def __init__(
        self,
        call: Call,
        engine_id: str = "engine",
        owner: Owner | None = None,
        space: int = SPACE,
        nbytes: int = CHUNK_BYTES,
        writers: Sequence[Owner] = (),
    ) -> None:
        self.call = call
        self.writers = list(writers)
        self.engine_id = engine_id
        self.owner = owner or this_process()
        self.space, self.nbytes = space, nbytes
        self.reader: ArenaReader | None = None
        self.slots: list[int] = []
        self.hello()

    def hello(self) -> Welcome:
        message = Hello(
            engine_id=self.engine_id,
            owner=self.owner,
            space=self.space,
            model="fake",
            slot_bytes=self.nbytes,
            held=self.slots,
            writers=self.writers,
        )
        welcome = decode(self.call("hello", encode(message)), Welcome)
        if self.reader is None or self.reader.header.arena_id != welcome.arena_id:
            self.close()
            self.reader = ArenaReader.attach(welcome.arena_path, welcome.arena_id)
        self.slots = list(welcome.grant.slots)
        return welcome

    def exchange(
        self, want: int = 0, commits: Sequence[Commit] = (), touched: Sequence[bytes] = ()
    ) -> ExchangeReply:
        message = Exchange(
            engine_id=self.engine_id, want=want, commits=list(commits), touched=b"".join(touched)
        )
        reply = decode(self.call("exchange", encode(message)), ExchangeReply)
        if reply.grant is not None:
            self.slots += reply.grant.slots
        return reply

    def tell(self, added: Sequence[bytes] = (), removed: Sequence[bytes] = ()) -> ExchangeReply:
        """Chunks came to the engine's own device, others went."""
        message = Exchange(
            engine_id=self.engine_id,
            device_added=b"".join(added),
            device_removed=b"".join(removed),
        )
        return decode(self.call("exchange", encode(message)), ExchangeReply)

    def save(self, keys: Sequence[bytes]) -> ExchangeReply:
        """Write and commit these chunks."""
        assert self.reader is not None
        if len(self.slots) < len(keys):
            self.exchange(want=len(keys) - len(self.slots))
        commits = []
        for key in keys:
            slot = self.slots.pop(0)
            view = self.reader.payload(slot, self.nbytes)
            view[:] = np.frombuffer(payload_of(key, self.nbytes), np.uint8)
            commits.append(Commit(slot=slot, key=key, nbytes=self.nbytes))
        return self.exchange(commits=commits)

    def intact(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are here, with exactly their bytes."""
        assert self.reader is not None
        hits = self.reader.lookup(key_array(keys))
        for i, key in enumerate(keys):
            if not hits.found[i]:
                return i
            at, nbytes = int(hits.offsets[i]), int(hits.nbytes[i])
            assert self.reader.data[at : at + nbytes].tobytes() == payload_of(key, self.nbytes)
        return len(keys)

    def stage_message(self, keys: Sequence[bytes], within: float = 10.0) -> bytes:
        return encode(
            Stage(
                engine_id=self.engine_id,
                keys=b"".join(keys),
                slot_bytes=self.nbytes,
                within=within,
            )
        )

    def stage(self, keys: Sequence[bytes], within: float = 10.0) -> StageReply:
        return decode(self.call("stage", self.stage_message(keys, within)), StageReply)

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None
