"""The Ray actor of one node: it forwards calls to its ``Node``, once there is one."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import platform
import socket
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import msgspec
import ray

from lmkv_ray.actors import log
from lmkv_ray.actors.exporter import EXPORT_SECONDS, Exporter
from lmkv_ray.actors.launch import Handle, memory_of_node, start
from lmkv_ray.actors.named import NamedActors
from lmkv_ray.actors.names import shard_name
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.config import Settings, settings_here
from lmkv_ray.errors import ArenaError, LmkvError
from lmkv_ray.messages import encode
from lmkv_ray.metrics.services import Sample, node_samples
from lmkv_ray.node import Node, ThisMachine
from lmkv_ray.node.loops import every, until
from lmkv_ray.status import ShardStatus
from lmkv_ray.transports import Answer

logger = logging.getLogger(__name__)

OPEN_SECONDS = 1.0, 10.0
"""First and longest pause before a shard without arena tries again to have one."""


def start_shard(settings: Settings, node_id: str) -> Handle:
    """The shard of a node, started if there is none. Blocks."""
    name, namespace = shard_name(node_id), settings.ray_namespace
    return start(ShardActor, name, namespace, (settings, node_id), node_id)


class ShardActor:
    """Owner of a node's arena; each method is that of ``Node``.

    While it cannot have an arena it tries again, and answers every call with the typed reason.

    Args:
        settings: those of the cache; what is a node's in them, this node's own environment may set.
        node_id: the Ray node it is pinned to.
    """

    async def __init__(self, settings: Settings, node_id: str) -> None:  # type: ignore[misc]
        log.show()
        self._settings = settings
        self._node_id = node_id
        self._found: Node | None = None
        self._failure: LmkvError = ArenaError(
            "The shard has no arena yet.", next_step="ask again in a few seconds."
        )
        self._warned = False
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        if not await self._open(restarted):
            self._opening = asyncio.create_task(until(OPEN_SECONDS, self._open, SYSTEM_CLOCK))
        export = Exporter(self._samples).step
        self._exporting = asyncio.create_task(
            every(EXPORT_SECONDS, "exporting metrics", export, SYSTEM_CLOCK)
        )

    async def _open(self, restarted: bool = True) -> bool:
        """Have a node; whether that worked, else it is tried again."""
        try:
            settings, others = settings_here(self._settings)
            if others and not self._warned:
                self._warned = True
                logger.warning(
                    "lmkv_ray: this node sets %s; the cache keeps the values it was started with",
                    ", ".join(f"LMKV_{name.upper()}" for name in others),
                )
            memory, store = await asyncio.to_thread(memory_of_node, self._node_id)
            machine = ThisMachine(self._node_id, restarted, memory, store)
            neighbours = NamedActors(settings.ray_namespace)
            self._found = await Node.open(settings, self._node_id, machine, neighbours)
        except Exception as error:
            if not isinstance(error, LmkvError):  # no files, threads or memory are left
                error = ArenaError(
                    f"The shard could not begin: {error!r}.",
                    next_step="none, if the machine is short of something for a moment: the shard "
                    "tries again. Else look into its log.",
                )
            if str(error) != str(self._failure):
                logger.error("lmkv_ray: no arena on node %s: %s", self._node_id, error)
            self._failure = error
            return False
        return True

    @property
    def _node(self) -> Node:
        """The node.

        Raises:
            LmkvError: there is none; why.
        """
        if self._found is None:
            raise self._failure
        return self._found

    async def hello(self, message: bytes) -> bytes:
        """See ``Node.hello``."""
        return self._node.hello(message)

    async def exchange(self, message: bytes) -> bytes:
        """See ``Node.exchange``."""
        return self._node.exchange(message)

    async def stage(self, message: bytes) -> bytes:
        """See ``Node.stage``."""
        return await self._node.stage(message)

    async def address(self, host: str = "") -> bytes:
        """Also says that the shard works, so ``connect`` waits for it."""
        return self._node.address(host)

    async def serve(self, transport: str, question: bytes) -> Answer:
        """See ``Node.serve``."""
        return await self._node.serve(transport, question)

    async def take(self, message: bytes) -> bytes:
        """See ``Node.take``."""
        return await self._node.take(message)

    async def drain(self, message: bytes) -> bytes:
        """See ``Node.drain``."""
        return await self._node.drain(message)

    async def where(self, keys: bytes) -> bytes:
        """See ``Node.where``."""
        return await self._node.where(keys)

    async def pin(self, keys: bytes, pinned: bool) -> bytes:
        """See ``Node.pin``."""
        return await self._node.pin(keys, pinned)

    async def evict(self, keys: bytes) -> bytes:
        """See ``Node.evict``."""
        return self._node.evict(keys)

    async def move(self, message: bytes) -> bytes:
        """See ``Node.move``."""
        return await self._node.move(message)

    async def clear(self, space: bytes = b"") -> bytes:
        """See ``Node.clear``."""
        return await self._node.clear(space)

    async def catch_up(self, message: bytes) -> bytes:
        """See ``Node.catch_up``."""
        return await self._node.catch_up(message)

    async def story(self) -> bytes:
        """See ``Node.story``."""
        return self._node.story()

    async def status(self) -> bytes:
        """``ShardStatus``, with the problem of a node that could not be opened."""
        return encode(self._describe())

    def _describe(self) -> ShardStatus:
        if self._found is None:
            problem = str(self._failure)
            status = ShardStatus(node_id=self._node_id, pid=os.getpid(), problem=problem)
        else:
            status = self._found.describe()
        return msgspec.structs.replace(
            status, host=socket.gethostname(), version=_versions(), wall=SYSTEM_CLOCK.wall()
        )

    def _samples(self) -> Iterable[Sample]:
        return node_samples(self._describe())


@functools.cache
def _versions() -> str:
    """For people: whose versions must agree on all nodes."""
    try:
        own = version("lmkv-ray")
    except PackageNotFoundError:  # the code came with a job's runtime_env
        own = "not installed"
    return f"lmkv_ray {own}, Ray {ray.__version__}, Python {platform.python_version()}"
