"""``lmkv_ray.connect()``: the cache of a Ray cluster, for people and for engines."""

from __future__ import annotations

import os
import socket
import time

import ray

from lmkv_ray.actors.cache import Cache, wait_for
from lmkv_ray.actors.directory import start_directory
from lmkv_ray.actors.launch import find
from lmkv_ray.actors.names import DIRECTORY, shard_name
from lmkv_ray.actors.shard import start_shard
from lmkv_ray.config import Settings, load_settings
from lmkv_ray.errors import ArenaError, ConnectError

PROBE_SECONDS = 3.0

_KEEPS = "a cache keeps the settings it was started with"


def connect(
    address: str | None = None, settings: Settings | None = None, *, start: bool = True
) -> Cache:
    """The cache of a Ray cluster; starts it if need be. Cheap to repeat, from any process.

    Args:
        address: of the Ray cluster. Default: the one this process is connected to, else the
            setting ``ray_address``, else ``RAY_ADDRESS``, else the cluster that runs on this
            machine, else a new one.
        settings: default: ``load_settings()``. Whoever starts the cache decides its settings.
        start: False: do not start anything, and do not wait for this node's shard (which is
            None if there is none).

    Raises:
        ConnectError: no cluster, no cache, or its actors do not start in time.
        ConfigError: a wrong setting.
        ArenaError: this node has no usable shared memory.
    """
    settings = settings or load_settings()
    _attach_to_ray(address or settings.ray_address or os.environ.get("RAY_ADDRESS"), start)
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


def _attach_to_ray(address: str | None, start: bool) -> None:
    if ray.is_initialized():
        return
    nobody = ConnectError(
        f"No Ray cluster answers {f'at {address}' if address else 'on this machine'}.",
        next_step="start one with 'ray start --head' or 'ray up', or correct the address.",
    )
    if address is not None and not _listens(address):
        raise nobody
    try:
        ray.init(address=address or "auto", configure_logging=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address is not None or not start:
            raise nobody from error
        ray.init(configure_logging=False, log_to_driver=False, include_dashboard=False)


def _listens(address: str) -> bool:
    """Whether there is somebody at all; Ray itself would try for two minutes and then exit."""
    if "://" in address:
        raise ConnectError(
            f"{address} is for Ray Client, which cannot share memory with a node.",
            next_step="run on a node of the cluster, with its address or with 'auto'.",
        )
    host, colon, port = address.rpartition(":")
    if not colon:
        return True  # auto, local
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_SECONDS):
            return True
    except (OSError, ValueError):
        return False
