"""A shard in this process: the real state machine and the real arena, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future

import msgspec
import numpy as np

from lmkv_ray.arena import ArenaWriter, this_process
from lmkv_ray.keys import key_array
from lmkv_ray.messages import (
    Exchange,
    Hello,
    MissReason,
    Stage,
    StageReply,
    Welcome,
    decode,
    encode,
)
from lmkv_ray.policies import make_policy
from lmkv_ray.shard import (
    Allocator,
    AssignExtent,
    DeltaLog,
    Free,
    Instruction,
    Limits,
    Publish,
    Reserve,
    Retire,
    ShardState,
)


class LocalShard:
    """Answers what a ``ShardClient`` asks, at once or, while ``frozen``, not at all."""

    def __init__(self, capacity: int, limits: Limits | None = None) -> None:
        self.writer = ArenaWriter.create("test", capacity)
        geometry = self.writer.geometry
        allocator = Allocator(
            geometry.extents,
            geometry.extent_bytes,
            geometry.min_slot_bytes,
            lambda: make_policy("lru"),
        )
        self.state = ShardState(
            allocator, this_process(), DeltaLog("test", self.writer.epoch), limits
        )
        self.peers = 0
        self.stage_reply: StageReply | None = None
        self.frozen = threading.Event()
        self.lock = threading.Lock()
        self.calls: list[str] = []

    def call(self, method: str, payload: bytes) -> Future[bytes]:
        self.calls.append(method)
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
        hello = decode(payload, Hello)
        size = self.writer.geometry.slot_size(hello.slot_bytes)
        hello = msgspec.structs.replace(hello, slot_bytes=size)
        grant, instructions = self.state.hello(hello, time.monotonic())
        self.apply(instructions)
        return encode(
            Welcome(
                arena_path=self.writer.path,
                arena_id=self.writer.arena_id,
                node_id="test",
                grant=grant,
                peers=self.peers,
            )
        )

    def exchange(self, payload: bytes) -> bytes:
        reply, instructions = self.state.exchange(decode(payload, Exchange), time.monotonic())
        self.apply(instructions)
        return encode(msgspec.structs.replace(reply, peers=self.peers))

    def stage(self, payload: bytes) -> bytes:
        decode(payload, Stage)
        return encode(self.stage_reply or StageReply(ready=0, reason=MissReason.NEVER_STORED))

    def clear(self, payload: bytes) -> bytes:
        self.apply(self.state.clear(int.from_bytes(payload, "little")))
        return b""

    def evict_all(self) -> None:
        """Evict every chunk, as a full arena would."""
        with self.lock:
            out: list[Instruction] = []
            evicted = self.state._allocator.evict(list(self.state._chunks))
            self.state._retire(evicted, MissReason.EVICTED, out)
            self.apply(out)

    def apply(self, instructions: Iterable[Instruction]) -> None:
        writer = self.writer
        for instruction in instructions:
            match instruction:
                case AssignExtent(extent, slot_bytes):
                    writer.assign_extent(extent, slot_bytes)
                case Reserve(slots, owner):
                    writer.reserve(np.array(slots), owner)
                case Publish(slots, keys, nbytes, space):
                    writer.publish(np.array(slots), key_array(keys), np.array(nbytes), space)
                case Retire(slots, reason):
                    writer.retire(np.array(slots), reason)
                case Free(slots):
                    writer.free(np.array(slots))

    def close(self) -> None:
        self.writer.close()
