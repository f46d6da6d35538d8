"""``lmkv_ray.connect()``: the cache of a Ray cluster, for people and for engines."""

from __future__ import annotations

import time

import ray

from lmkv_ray.actors.cache import Cache, wait_for
from lmkv_ray.actors.cluster import join
from lmkv_ray.actors.directory import start_directory
from lmkv_ray.actors.launch import find
from lmkv_ray.actors.names import DIRECTORY, shard_name
from lmkv_ray.actors.shard import start_shard
from lmkv_ray.config import Settings, load_settings
from lmkv_ray.errors import ArenaError, ConnectError

_KEEPS = "a cache keeps the settings it was started with"


def connect(
    address: str | None = None, settings: Settings | None = None, *, start: bool = True
) -> Cache:
    """The cache of a Ray cluster; starts it if need be. Cheap to repeat, from any process.

    Args:
        address: of the Ray cluster. Default: the one this process is connected to, else the
            setting ``ray_address``, else ``RAY_ADDRESS``, else the cluster that runs on this
            machine, else a new one.
        settings: default: ``load_settings()``. The process that starts the cache decides its
            settings.
        start: False: do not start anything, and do not wait for this node's shard (which is
            None if there is none).

    Raises:
        ConnectError: no cluster, no cache, or its actors do not start in time.
        ConfigError: a wrong setting.
        ArenaError: this node has no usable shared memory.
    """
    settings = settings or load_settings()
    join(address or settings.ray_address, start=start)
    node_id = ray.get_runtime_context().get_node_id()
    namespace = settings.ray_namespace
    deadline = time.monotonic() + settings.connect_seconds
    if not start:
        directory, shard = find(DIRECTORY, namespace), find(shard_name(node_id), namespace)
        if directory is None:
            raise ConnectError(
                f"No cache runs in Ray namespace {namespace!r}.",
                next_step="start an engine with the lmkv_ray connector, or lmkv_ray.connect().",
            )
        return Cache(settings, node_id, shard, directory)
    directory, shard = start_directory(settings), start_shard(settings, node_id)
    try:
        wait_for(shard.address.remote(), deadline - time.monotonic())
    except ArenaError as error:
        raise ArenaError(
            error.what, next_step=f"{error.next_step} Then run 'lmkv stop': {_KEEPS}."
        ) from None
    return Cache(settings, node_id, shard, directory)
