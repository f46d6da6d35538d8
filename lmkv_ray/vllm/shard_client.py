"""How an engine calls the shard of its node: an actor of Ray."""

from __future__ import annotations

from concurrent.futures import Future

from lmkv_ray.actors import connect
from lmkv_ray.config import Settings
from lmkv_ray.errors import ConnectError
from lmkv_ray.vllm.link import ShardClient


class RayShardClient(ShardClient):
    """The shard actor of this node.

    Args:
        settings: of the cache.
        start: start the cache if there is none.
    """

    def __init__(self, settings: Settings, *, start: bool) -> None:
        shard = connect(settings=settings, start=start).shard
        if shard is None:
            raise ConnectError("This node has no shard yet.", next_step="wait for the directory.")
        self._shard = shard

    def call(self, method: str, payload: bytes) -> Future[bytes]:
        """Call a method of the actor."""
        future: Future[bytes] = getattr(self._shard, method).remote(payload).future()
        return future
