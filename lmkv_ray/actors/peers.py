"""What a shard sees of the rest of the cluster. Every call ends in time, whoever is dead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import msgspec
from ray.exceptions import RayError

from lmkv_ray.actors.launch import Handle, find
from lmkv_ray.actors.names import DIRECTORY, shard_name
from lmkv_ray.actors.wire import PeerAddress
from lmkv_ray.directory import Holding
from lmkv_ray.messages import Delta, DeltaReply, decode, encode
from lmkv_ray.transports import PeerInfo

SILENT_SECONDS = 3.0
"""A directory that owes an answer for longer is not asked, nor waited for."""
ANSWER_SECONDS = 30.0
"""A delta that is not answered for so long is given up."""

_HOLDINGS = msgspec.msgpack.Decoder(list[Holding])


class RayPeers:
    """The directory and the other shards, by their names.

    Args:
        namespace: Ray's.
        node_id: our own.
    """

    def __init__(self, namespace: str, node_id: str) -> None:
        self._namespace = namespace
        self._node_id = node_id
        self._directory: Handle | None = None
        self._peers: dict[str, PeerInfo] = {}
        self._told_at: float | None = None
        self._others = 0

    @property
    def count(self) -> int:
        """Other nodes that hold chunks; 0 while nobody could say which."""
        return 0 if self._is_silent() else self._others

    async def tell(self, delta: Delta) -> DeltaReply | None:
        """Send a delta; None if there is no answer.

        One at a time: a directory that hangs finds one message when it wakes up, not thousands.
        """
        self._told_at = time.monotonic()
        answer = await self._ask_directory("delta", encode(delta), within=ANSWER_SECONDS)
        if answer is None:
            self._others = 0
            return None
        self._told_at = None
        reply = decode(answer, DeltaReply)
        self._others = reply.peers
        return reply

    async def lookup(self, keys: bytes, within: float) -> list[Holding] | None:
        """Who holds what; None if the directory does not answer in time."""
        if self._is_silent():
            return None
        within = min(within, SILENT_SECONDS)
        answer = await self._ask_directory("lookup", keys, self._node_id, within=within)
        return None if answer is None else _HOLDINGS.decode(answer)

    async def clear(self, space: bytes) -> bool:
        """Ask for a clear on all nodes; whether it was accepted."""
        answer = await self._ask_directory("clear", space, within=SILENT_SECONDS)
        return answer is not None

    async def peer(self, node_id: str, within: float) -> PeerInfo | None:
        """How to read from a node; None if it does not answer in time."""
        known = self._peers.get(node_id)
        if known is not None:
            return known
        handle = await asyncio.to_thread(find, shard_name(node_id), self._namespace)
        if handle is None:
            return None
        answer = await in_time(handle.address.remote(), min(within, SILENT_SECONDS))
        if answer is None:
            return None
        address = decode(answer, PeerAddress)

        def read(keys: bytes) -> Awaitable[Any]:
            batch: Awaitable[Any] = handle.read.remote(keys)
            return batch

        peer = PeerInfo(node_id, address.host, address.arena_path, address.arena_id, read)
        self._peers[node_id] = peer
        return peer

    def forget(self, node_id: str) -> None:
        """What is known about a node was wrong."""
        self._peers.pop(node_id, None)

    def _is_silent(self) -> bool:
        return self._told_at is not None and time.monotonic() > self._told_at + SILENT_SECONDS

    async def _ask_directory(self, method: str, *args: object, within: float) -> bytes | None:
        if self._directory is None:
            self._directory = await asyncio.to_thread(find, DIRECTORY, self._namespace)
        if self._directory is None:
            return None
        answer = await in_time(getattr(self._directory, method).remote(*args), within)
        if answer is None:
            self._directory = None  # maybe it was ended for good and there is a new one
        return answer


async def in_time(answer: Awaitable[bytes], within: float) -> bytes | None:
    """The answer of an actor, or None: it is dead, restarting, or too slow."""
    try:
        return await asyncio.wait_for(answer, max(within, 0))
    except (TimeoutError, RayError):
        return None
