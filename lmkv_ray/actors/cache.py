"""The cache of a Ray cluster as a Python object."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from lmkv_ray.actors.launch import Handle, actor_names, find, kill
from lmkv_ray.actors.names import directory_name, shard_name
from lmkv_ray.config import Settings
from lmkv_ray.directory import GPU, MEMORY, Holding, Location
from lmkv_ray.errors import ConnectError, LmkvError, TierError
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import ClearDone, decode, encode
from lmkv_ray.node.tiers import TIER_SETTINGS
from lmkv_ray.orders import Drain, Drained, Move, PeerAddress
from lmkv_ray.status import CacheStatus
from lmkv_ray.tenants import clear_bytes

CALL_SECONDS = 10.0
"""How long a call of a running cache may take."""


class Cache:
    """The cache of a Ray cluster: one shard per node, one directory. Made by ``connect``.

    Attributes:
        node_id: the Ray node of this process.
        shard: the actor of that node; engines talk to it with ``lmkv_ray.messages``.
        directory: the actor that knows which node holds what.
    """

    def __init__(self, settings: Settings, node_id: str, shard: Handle, directory: Handle) -> None:
        self._settings = settings
        self.node_id = node_id
        self.shard = shard
        self.directory = directory

    def status(self) -> CacheStatus:
        """Nodes, chunks, bytes, capacity and engines.

        Raises:
            ConnectError: the cache was stopped, or does not answer.
        """
        return decode(wait_for(self.directory.status.remote(), CALL_SECONDS), CacheStatus)

    def story(self) -> dict[str, list[str]]:
        """The last events of every shard and part of the directory, for a report of a fault.

        Returns:
            lines by service, the oldest first. A service that does not answer is left out.

        Raises:
            ConnectError: the cache was stopped, or does not answer.
        """
        status, namespace = self.status(), self._settings.ray_namespace
        asked = {}
        for part in status.directory:
            if (actor := find(directory_name(part.part), namespace)) is not None:
                asked[f"directory {part.part}"] = actor.story.remote()
        for node in status.nodes:
            if (actor := find(shard_name(node.node_id), namespace)) is not None:
                asked[f"node {node.name}"] = actor.story.remote()
        deadline = time.monotonic() + CALL_SECONDS
        stories: dict[str, list[str]] = {}
        for service, answer in asked.items():
            with contextlib.suppress(LmkvError):
                lines = wait_for(answer, deadline - time.monotonic())
                stories[service] = msgspec.msgpack.decode(lines, type=list[str])
        return stories

    def clear(self, namespace: str = "", salt: str | None = None) -> list[str]:
        """Remove chunks from every node. What is being saved meanwhile does not come back.

        Args:
            namespace: of which engines, as their logs name it (hex); empty: of all.
            salt: of which tenant: the requests with this ``cache_salt``; empty: those without one;
                None: of all. Both together: of this tenant in this namespace.

        Returns:
            names of tiers (``disk``, ``remote``) that some node cannot clear at present. Nothing of
            it is served from there, and it is removed when the tier works again. But other
            clusters that share a remote store do not know of it until then.

        Raises:
            ConfigError: this is no namespace.
            ConnectError: the cache was stopped, or does not answer.
        """
        answer = self.directory.clear.remote(clear_bytes(namespace, salt))
        return decode(wait_for(answer, CALL_SECONDS), ClearDone).pending

    def drain(self, node: str, seconds: float | None = None) -> Drained:
        """Let a node hand over the chunks that only it holds, before it is ended.

        It is the node's farewell: it serves what it has until it ends, but takes nothing from
        others any more. Nodes that Ray drains do this by themselves.

        Args:
            node: its id, or the beginning of it.
            seconds: default: the setting ``drain_seconds``.

        Raises:
            ConnectError: there is not exactly one such node, or it does not answer.
        """
        node_id = self._node(node)
        within = self._settings.drain_seconds if seconds is None else seconds
        for shard in self._shards([node_id]):
            answer = shard.drain.remote(encode(Drain(within=within)))
            return decode(wait_for(answer, within + CALL_SECONDS), Drained)
        raise ConnectError("The node's shard has just ended.", next_step="look at 'lmkv status'.")

    def where(self, keys: Sequence[bytes]) -> list[list[Location]]:
        """Where each chunk is: engines' own prefix caches, nodes' memory, nodes' disks.

        A hint of a moment ago, for a router of requests. Devices and memory are asked
        of the directory, disks of each node; what a store that all nodes share holds is not asked.

        Returns:
            for each key its locations, the quickest kind first. Raises as ``pin`` does.
        """
        joined = b"".join(keys)
        known = wait_for(self.directory.where.remote(joined), CALL_SECONDS)
        locations: list[list[Location]] = [[] for _ in keys]
        for answer in (known, *self._ask_shards("where", joined)):
            for holding in msgspec.msgpack.decode(answer, type=list[Holding]):
                for position in holding.positions:
                    locations[position].append(holding.location)
        return [sorted(of_key, key=_by_speed) for of_key in locations]

    def pin(self, keys: Sequence[bytes]) -> int:
        """Keep chunks from being evicted to make room, wherever they are; at most half of a node.

        A pin lasts as long as the chunk's memory, also when the shard is restarted. A request's
        answer tells the keys of its chunks (see ``lmkv_ray.vllm.scheduler.wishes``).

        Returns:
            how many of them are pinned in the memory of some node now.

        Raises:
            ConnectError: the cache was stopped, or does not answer.
        """
        return len(self._everywhere("pin", b"".join(keys), True))

    def unpin(self, keys: Sequence[bytes]) -> None:
        """Let chunks be evicted again. Raises as ``pin`` does."""
        self._everywhere("pin", b"".join(keys), False)

    def evict(self, keys: Sequence[bytes]) -> int:
        """Remove chunks from the memory of all nodes; lower tiers keep theirs.

        Returns:
            how many there were. Raises as ``pin`` does.
        """
        return len(self._everywhere("evict", b"".join(keys)))

    def move(self, keys: Sequence[bytes], to: str, seconds: float = 30.0) -> int:
        """Move chunks out of the memory of all nodes to a tier or a node.

        Args:
            keys: 16 bytes each, naming the chunks.
            to: ``disk`` (each node's own), ``remote``, or the id of a node or its beginning.
            seconds: time for it.

        Returns:
            how many are there now.

        Raises:
            TierError: no node has this tier.
            ConnectError: there is not exactly one such node, or the cache does not answer.
        """
        if to not in TIER_SETTINGS:
            to = self._node(to)
        elif not any(tier.name == to for node in self.status().nodes for tier in node.tiers):
            raise TierError(
                f"No node of the cache has the tier {to!r}.",
                next_step=f"set {TIER_SETTINGS[to]} (docs/settings.md) and start the cache again.",
            )
        move = encode(Move(keys=b"".join(keys), to=to, within=seconds))
        return len(self._everywhere("move", move, within=seconds + CALL_SECONDS))

    def stop(self) -> None:
        """End all actors of the cache. Its memory is freed when the last engine ends.

        Raises:
            ConnectError: an actor did not end in time.
        """
        namespace = self._settings.ray_namespace
        deadline = time.monotonic() + CALL_SECONDS
        # The directory first: it would start the shards again.
        while names := actor_names(namespace):
            for name in names:
                kill(name, namespace)
            if time.monotonic() > deadline:
                raise ConnectError(
                    f"These actors did not end: {', '.join(names)}.",
                    next_step="run 'lmkv stop' again, or end the Ray cluster with 'ray stop'.",
                )
            time.sleep(0.05)

    def shard_of(self, host: str) -> Handle | None:
        """The shard that runs where ``host_id()`` is ``host``, if there is one already.

        Raises:
            ConnectError: the cache was stopped, or does not answer.
        """
        shards = self._shards([node.node_id for node in self.status().nodes if not node.problem])
        asked = {shard.address.remote(): shard for shard in shards}
        deadline = time.monotonic() + CALL_SECONDS
        while asked:  # whichever answers first: one that hangs is not waited for
            done, _ = ray.wait(list(asked), timeout=max(deadline - time.monotonic(), 0))
            if not done:
                break
            shard = asked.pop(done[0])
            with contextlib.suppress(LmkvError):  # its node was lost
                if decode(wait_for(done[0], 0), PeerAddress).host == host:
                    return shard
        return None

    def _everywhere(self, method: str, *args: object, within: float = CALL_SECONDS) -> set[bytes]:
        """Call a method of every shard that answers; the keys they name."""
        keys = b"".join(self._ask_shards(method, *args, within=within))
        return set(key_list(key_array(keys)))

    def _ask_shards(self, method: str, *args: object, within: float = CALL_SECONDS) -> list[bytes]:
        shards = self._shards([node.node_id for node in self.status().nodes if not node.problem])
        answers = [getattr(shard, method).remote(*args) for shard in shards]
        deadline = time.monotonic() + within
        return [wait_for(answer, deadline - time.monotonic()) for answer in answers]

    def _node(self, start: str) -> str:
        """The id of the node that begins so."""
        ids = [node.node_id for node in self.status().nodes if node.node_id.startswith(start)]
        if len(ids) != 1:
            raise ConnectError(
                f"{len(ids)} nodes of the cache have an id that begins with {start!r}.",
                next_step="'lmkv status' lists them.",
            )
        return ids[0]

    def _shards(self, node_ids: Sequence[str]) -> list[Handle]:
        namespace = self._settings.ray_namespace
        found = [find(shard_name(node_id), namespace) for node_id in node_ids]
        return [shard for shard in found if shard is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the cache running: it belongs to the cluster, not to this process."""


def wait_for(answer: object, within: float) -> bytes:
    """What an actor of the cache answers.

    Raises:
        ConnectError: nothing in time.
        LmkvError: the actor's own.
    """
    try:
        result: bytes = ray.get(answer, timeout=max(within, 0))  # type: ignore[call-overload]
    except RayTaskError as error:
        if isinstance(error.cause, LmkvError):
            raise error.cause from None
        raise ConnectError(
            f"An actor of the cache failed: {error.cause!r}.",
            next_step="look into its log in /tmp/ray/session_latest/logs.",
        ) from error
    except GetTimeoutError as error:
        raise ConnectError(
            f"The cache did not answer within {within:.0f} s.",
            next_step="look at 'ray list actors'; raise LMKV_CONNECT_SECONDS if nodes are slow.",
        ) from error
    except RayError as error:
        raise ConnectError(
            "The cache was stopped, or its node was lost.", next_step="connect again."
        ) from error
    return result


def _by_speed(location: Location) -> tuple[int, Location]:
    kinds = (GPU, MEMORY)
    return kinds.index(location.tier) if location.tier in kinds else len(kinds), location
