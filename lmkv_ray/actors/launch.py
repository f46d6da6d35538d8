"""Finding or starting the cache's actors. Everything here blocks: from an actor use a thread."""

from __future__ import annotations

from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmkv_ray.actors.names import DIRECTORY, is_ours, shard_name
from lmkv_ray.config import Settings

Handle: TypeAlias = Any
"""A ``ray.actor.ActorHandle``, whose methods no type checker knows."""


def start_directory(settings: Settings) -> Handle:
    """The directory, started if there is none. Calls are queued until it runs."""
    from lmkv_ray.actors.directory import DirectoryActor

    return _start(DirectoryActor, DIRECTORY, settings, None, (settings,))


def start_shard(settings: Settings, node_id: str) -> Handle:
    """The shard of a node, started if there is none. Calls are queued until it runs."""
    from lmkv_ray.actors.shard import ShardActor

    place = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    return _start(ShardActor, shard_name(node_id), settings, place, (settings, node_id))


def find(name: str, namespace: str) -> Handle | None:
    """A running actor by its name."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


def actor_names(namespace: str) -> list[str]:
    """The names of the actors of a cache, the directory first."""
    found = ray.util.list_named_actors(all_namespaces=True)
    ours = [a["name"] for a in found if a["namespace"] == namespace and is_ours(a["name"])]
    return sorted(ours, key=lambda name: (name != DIRECTORY, name))


def kill(name: str, namespace: str) -> None:
    """End an actor for good."""
    actor = find(name, namespace)
    if actor is not None:
        ray.kill(actor, no_restart=True)


def _start(
    kind: type,
    name: str,
    settings: Settings,
    place: NodeAffinitySchedulingStrategy | None,
    arguments: tuple[object, ...],
) -> Handle:
    options = {
        "name": name,
        "namespace": settings.ray_namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": 1000,
    }
    if place is not None:
        options["scheduling_strategy"] = place
    actor_class: Any = ray.remote(kind)
    actor: Handle = actor_class.options(**options).remote(*arguments)
    return actor
