"""Peers that behave, and that misbehave on demand; in this process or as a Ray actor."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from lmkv_ray.arena import ArenaReader, ArenaWriter, Hits, this_process
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.host import host_id
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import MissReason, decode, encode
from lmkv_ray.orders import Offer
from lmkv_ray.transports import (
    Answer,
    ChunkBatch,
    Helper,
    NixlServer,
    NixlTransport,
    PeerInfo,
    Servers,
    all_servers,
)
from lmkv_ray.transports.nixl import Locate, Located

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
        self.keys = some_keys()
        self.slots = self.writer.assign_extent(0, CHUNK)[:COUNT]
        self.fill(self.keys)
        self.helper = Helper(self.writer, SYSTEM_CLOCK)
        known = all_servers(self.reader, self.writer, self.helper, SYSTEM_CLOCK)
        self.servers = Servers(known)
        self.mood = ""
        self.calls = 0
        self.hanging = asyncio.Event()

    def fill(self, keys: KeyArray) -> None:
        self.writer.reserve(self.slots, this_process())
        for slot, key in zip(self.slots.tolist(), keys, strict=True):
            content = content_of(key)
            self.writer.payload(slot)[: len(content)] = content
        self.writer.publish(self.slots, keys, len(content), 1)

    def reset(self) -> None:
        """As if new."""
        self.writer.retire(self.slots, MissReason.CLEARED)
        self.fill(self.keys)
        self.set_mood("")
        self.calls = 0
        self.hanging.set()
        self.hanging = asyncio.Event()

    def describe(self) -> tuple[str, int, dict[str, Offer]]:
        """What a ``PeerInfo`` says, but that it is read from this host."""
        return host_id(), self.writer.arena_id, self.servers.offers(host_id())

    def info(self) -> PeerInfo:
        """For a reader in this process."""
        return PeerInfo("peer", *self.describe(), self.serve)

    def set_mood(self, mood: str) -> None:
        """From now on: corrupt, die, fail, hang, nonsense, hang_later (but for the first keys), or
        replace (once: all chunks give way to others when it has answered, before it is sent).
        """
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
                    ArenaReader.lookup = lookup  # type: ignore[method-assign]
                return hits

        ArenaReader.lookup = wrapped  # type: ignore[method-assign, assignment]

    async def serve(self, transport: str, question: bytes) -> Answer:
        """Answer as the mood is."""
        asks = transport == NixlServer.name
        await self.behave(decode(question, Locate).keys if asks else question)
        answer = await self.servers.answer(transport, question)
        return self._spoiled(answer) if isinstance(answer, ChunkBatch) else self._misled(answer)

    def _spoiled(self, batch: ChunkBatch) -> ChunkBatch:
        if self.mood == "corrupt":
            first = batch.chunks[0].copy()
            first[7] ^= 1
            batch = replace(batch, chunks=[first, *batch.chunks[1:]])
        self.maybe_replace()
        if self.mood == "nonsense":
            batch = replace(batch, chunks=[chunk[:-1] for chunk in batch.chunks])
        return batch

    def _misled(self, answer: bytes) -> bytes:
        located = decode(answer, Located)
        if self.mood == "corrupt":
            self.reader.data[int.from_bytes(located.offsets[:8], sys.byteorder) + 7] ^= 1
        self.maybe_replace()
        if self.mood == "nonsense":
            answer = encode(msgspec.structs.replace(located, nbytes=located.nbytes[:-8]))
        return answer

    def maybe_replace(self) -> None:
        if self.mood == "replace":
            self.mood = ""
            self.writer.retire(self.slots, MissReason.EVICTED)
            self.fill(some_keys(seed=1))

    async def behave(self, keys: bytes) -> None:
        self.calls += 1
        match self.mood:
            case "die":
                os._exit(1)
            case "fail":
                raise ConnectionError("the peer does not want to")
            case "hang":
                await self.hanging.wait()
            case "hang_later" if keys[:16] != self.keys[:1].tobytes():
                await self.hanging.wait()

    async def close(self) -> None:
        await self.helper.close()
        self.reader.close()
        self.writer.close()


class Here:
    """The arena that chunks are fetched into, and what reads into it."""

    def __init__(self) -> None:
        self.writer = ArenaWriter.create(f"here{secrets.token_hex(4)}", 4 << 20)
        slots = [self.writer.assign_extent(extent, CHUNK) for extent in range(2)]
        self.slots = np.concatenate(slots).tolist()
        self.helper = Helper(self.writer, SYSTEM_CLOCK)
        self.transport = NixlTransport(
            self.writer, self.helper, SYSTEM_CLOCK, window_bytes=(2 * CHUNK,) * 2
        )

    def places(self, count: int, start: int = 0) -> list[np.ndarray]:
        """Zeroed slots."""
        places = [self.writer.payload(slot) for slot in self.slots[start : start + count]]
        for place in places:
            place[:] = 0
        return places

    async def close(self) -> None:
        await self.helper.close()
        self.writer.close()


class LocalPeer:
    """A store in this process."""

    def __init__(self) -> None:
        self.store = Store()
        self.alive = True

    def info(self) -> PeerInfo:
        return self.store.info()

    def do(self, method: str, *args: object) -> None:
        getattr(self.store, method)(*args)

    async def die(self) -> None:
        self.alive = False
        await self.store.close()
        self.store.set_mood("fail")

    async def close(self) -> None:
        await self.store.close()


class RayPeer:
    """A store in an actor."""

    def __init__(self) -> None:
        import ray

        self.ray = ray
        self.alive = True
        actor_class: Any = ray.remote(Store)
        self.actor = actor_class.options(num_cpus=0, max_concurrency=8).remote()

    def info(self) -> PeerInfo:
        host, arena_id, offers = self.ray.get(self.actor.describe.remote())
        # A lambda, not the bound method: what a shard actor does.
        return PeerInfo(
            "peer", host, arena_id, offers, lambda *asked: self.actor.serve.remote(*asked)
        )

    def do(self, method: str, *args: object) -> None:
        self.ray.get(getattr(self.actor, method).remote(*args))

    async def die(self) -> None:
        self.alive = False
        self.do("set_mood", "die")

    async def close(self) -> None:
        self.ray.kill(self.actor)


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another process does."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Peers:
    """One peer in this process and one in Ray, for as long as they live: starting takes time."""

    def __init__(self) -> None:
        self._peers: dict[type, LocalPeer | RayPeer] = {}

    async def get(self, kind: type[LocalPeer | RayPeer]) -> LocalPeer | RayPeer:
        if kind in self._peers:
            if self._peers[kind].alive:
                self._peers[kind].do("reset")
                return self._peers[kind]
            await self._peers[kind].close()
        self._peers[kind] = kind()
        return self._peers[kind]

    async def close(self) -> None:
        if LocalPeer in self._peers:  # the other one ends with Ray
            await self._peers[LocalPeer].close()
