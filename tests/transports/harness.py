"""Peers that behave, and that misbehave on demand; in this process or as a Ray actor."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from lmkv_ray.arena import ArenaReader, ArenaWriter, Hits, this_process
from lmkv_ray.keys import KeyArray, key_array
from lmkv_ray.messages import MissReason
from lmkv_ray.transports import Batch, ChunkReader, PeerInfo, host_id

CHUNK = 64 << 10
COUNT = 12


def some_keys(count: int = COUNT, seed: int = 0) -> KeyArray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)


def content_of(key: np.ndarray) -> np.ndarray:
    """The bytes of a key's chunk; never zero. The last page of each slot is not used."""
    return np.resize(key.view(np.uint8), CHUNK - 4096) | np.uint8(1)


class Store:
    """A peer's arena with ``COUNT`` chunks, and its answers to ``read``."""

    def __init__(self) -> None:
        self.writer = ArenaWriter.create(f"test{secrets.token_hex(4)}", 4 << 20)
        self.reader = ArenaReader.attach(self.writer.path)
        self.chunks = ChunkReader(self.reader)
        self.keys = some_keys()
        self.slots = self.writer.assign_extent(0, CHUNK)[:COUNT]
        self.fill(self.keys)
        self.mood = ""
        self.calls = 0

    def fill(self, keys: KeyArray) -> None:
        self.writer.reserve(self.slots, this_process())
        for slot, key in zip(self.slots.tolist(), keys, strict=True):
            content = content_of(key)
            self.writer.payload(slot)[: len(content)] = content
        self.writer.publish(self.slots, keys, len(content), 1)

    def describe(self) -> tuple[str, str, int]:
        return host_id(), self.writer.path, self.writer.arena_id

    def set_mood(self, mood: str) -> None:
        """From now on: corrupt, die, fail, hang, nonsense, or hang_later (from the second call)."""
        self.mood = mood

    def rewrite_after_next_lookup(self) -> None:
        """Between the next lookup and its copies, all chunks give way to others."""
        lookup, lock = ArenaReader.lookup, threading.Lock()

        def wrapped(reader: ArenaReader, keys: KeyArray) -> Hits:
            with lock:  # several threads read at once
                hits = lookup(reader, keys)
                if ArenaReader.lookup is wrapped:
                    self.writer.retire(self.slots, MissReason.EVICTED)
                    self.fill(some_keys(seed=1))
                    ArenaReader.lookup = lookup
                return hits

        ArenaReader.lookup = wrapped

    async def read(self, keys: bytes) -> Batch:
        self.calls += 1
        match self.mood:
            case "die":
                os._exit(1)
            case "fail":
                raise ConnectionError("the peer does not want to")
            case "hang":
                await asyncio.Event().wait()
            case "hang_later" if self.calls > 1:
                await asyncio.Event().wait()
        batch = await asyncio.to_thread(self.chunks.read, key_array(keys))
        if self.mood == "corrupt":
            payload = batch.payload.copy()
            payload[7] ^= 1
            batch = replace(batch, payload=payload)
        if self.mood == "nonsense":
            batch = replace(batch, payload=batch.payload[:-1])
        return batch

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


class LocalPeer:
    """A store in this process."""

    def __init__(self) -> None:
        self.store = Store()

    def info(self) -> PeerInfo:
        return PeerInfo("peer", *self.store.describe(), read=self.store.read)

    def do(self, method: str, *args: object) -> None:
        getattr(self.store, method)(*args)

    def die(self) -> None:
        self.store.close()
        self.store.set_mood("fail")

    def close(self) -> None:
        self.store.close()


class RayPeer:
    """A store in an actor."""

    def __init__(self) -> None:
        import ray

        self.ray = ray
        self.actor: Any = ray.remote(num_cpus=0, max_concurrency=8)(Store).remote()

    def info(self) -> PeerInfo:
        description = self.ray.get(self.actor.describe.remote())
        # A lambda, not the bound method: what a shard actor does.
        return PeerInfo("peer", *description, read=lambda keys: self.actor.read.remote(keys))

    def do(self, method: str, *args: object) -> None:
        self.ray.get(getattr(self.actor, method).remote(*args))

    def die(self) -> None:
        self.do("set_mood", "die")

    def close(self) -> None:
        self.ray.kill(self.actor)
