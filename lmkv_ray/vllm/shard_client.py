"""How an engine calls the shard of one of its nodes: an actor of Ray."""

from __future__ import annotations

from concurrent.futures import Future

from lmkv_ray.actors import connect
from lmkv_ray.config import Settings
from lmkv_ray.errors import ConnectError
from lmkv_ray.vllm.link import ShardClient


class RayShardClient(ShardClient):
    """The shard actor of a node.

    Args:
        settings: of the cache.
        start: start the cache if there is none.
        host: ``host_id`` of another node; None: this one.

    Raises:
        ConnectError: there is no cache, or it has no shard there yet.
    """

    def __init__(self, settings: Settings, *, start: bool, host: str | None = None) -> None:
        cache = connect(settings=settings, start=start)
        shard = cache.shard if host is None else cache.shard_of(host)
        if shard is None:
            raise ConnectError(
                f"{'This node' if host is None else 'A node of this engine'} has no shard yet.",
                next_step="wait for the directory, or see whether the node is in the Ray cluster.",
            )
        self._shard = shard

    def call(self, method: str, payload: bytes) -> Future[bytes]:
        """Call a method of the actor."""
        future: Future[bytes] = getattr(self._shard, method).remote(payload).future()
        return future
