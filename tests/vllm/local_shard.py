"""A shard in this process: the real state machine and the real arena, without Ray."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import msgspec

from lmkv_ray.arena import ArenaWriter
from lmkv_ray.config import load_settings
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import (
    Hello,
    MissReason,
    Stage,
    StageReply,
    Welcome,
    decode,
    decode_exchange,
    encode,
)
from lmkv_ray.node import ThisMachine
from lmkv_ray.node.shard import Shard
from lmkv_ray.shard import ShardState

MACHINE = ThisMachine("test", restarted=False)


class LocalShard:
    """Answers what a ``ShardClient`` asks, at once or, while ``frozen``, not at all."""

    def __init__(self, capacity: int, grant_seconds: float = 30.0) -> None:
        self.settings = load_settings({"grant_seconds": grant_seconds})
        self.writer = ArenaWriter.create("test", capacity)
        self.shard = Shard(self.writer, self.settings, "test", MACHINE)
        self.peers = 0
        self.stage_reply: StageReply | None = None
        self.stages = 0
        self.frozen = threading.Event()
        self.lock = threading.Lock()

    def connect(self, *_: object, **__: object) -> LocalShard:
        """Itself, wherever it is looked for."""
        return self

    @property
    def state(self) -> ShardState:
        return self.shard.state

    def call(self, method: str, payload: bytes) -> Future[bytes]:
        future: Future[bytes] = Future()
        if self.frozen.is_set():
            return future
        try:
            with self.lock:
                future.set_result(getattr(self, method)(payload))
        except Exception as error:
            future.set_exception(error)
        return future

    def hello(self, payload: bytes) -> bytes:
        grant = self.shard.hello(decode(payload, Hello))
        return encode(
            Welcome(
                arena_path=self.writer.path,
                arena_id=self.writer.arena_id,
                node_id="test",
                grant=grant,
                peers=self.peers,
                clock=time.monotonic(),
            )
        )

    def exchange(self, payload: bytes) -> bytes:
        reply = self.shard.exchange(decode_exchange(payload))
        return encode(msgspec.structs.replace(reply, peers=self.peers))

    def stage(self, payload: bytes) -> bytes:
        stage = decode(payload, Stage)
        self.stages += 1
        if stage.locate:
            keys = key_list(key_array(stage.keys))
            ready = next((i for i, k in enumerate(keys) if k not in self.state.chunks), len(keys))
            reason = self.shard.why_missing(keys[ready]) if ready < len(keys) else None
            reply = StageReply(ready=ready, reason=reason)
            return encode(self.shard.located(reply, stage.keys, stage.slot_bytes))
        return encode(self.stage_reply or StageReply(ready=0, reason=MissReason.NEVER_STORED))

    def clear(self, payload: bytes) -> bytes:
        self.shard.clear(int.from_bytes(payload, "little"))
        return b""

    def restart(self) -> None:
        """Forget everything but the arena, as a restarted shard does."""
        with self.lock:
            self.shard.reader.close()
            self.shard = Shard(self.writer, self.settings, "test", MACHINE)

    def evict_all(self) -> None:
        """Evict every chunk, as a full arena would."""
        with self.lock:  # threads of an engine that is being tested do it too
            self.shard.evict(list(self.state.chunks))

    def evict(self, keys: list[bytes]) -> None:
        """Evict some chunks."""
        with self.lock:
            self.shard.evict(keys)

    def close(self) -> None:
        self.shard.close()
