"""Finding or starting the cache's actors. Everything here blocks: from an actor use a thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmkv_ray.actors.names import DIRECTORY, is_directory, is_ours

Handle: TypeAlias = Any
"""A ``ray.actor.ActorHandle``, whose methods no type checker knows."""


def find(name: str, namespace: str) -> Handle | None:
    """A running actor by its name."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


def actor_names(namespace: str) -> list[str]:
    """The names of the actors of a cache, the directory's first part first."""
    found = ray.util.list_named_actors(all_namespaces=True)
    ours = [a["name"] for a in found if a["namespace"] == namespace and is_ours(a["name"])]
    return sorted(ours, key=lambda name: (name != DIRECTORY, not is_directory(name), name))


def leaving_nodes() -> dict[str, float]:
    """Nodes that Ray drains, and in how many seconds they end (infinity: when nothing runs there).

    Ray's autoscaler drains idle nodes, and nodes whose machine is about to be taken away.
    """
    # Not public, but what Ray Serve uses as well; it takes wall-clock milliseconds.
    try:
        nodes: dict[str, int] = ray._private.state.state.get_draining_nodes()
    except AttributeError:  # another Ray: nodes leave without a farewell
        return {}
    now = time.time()
    return {node_id: ends / 1000 - now if ends > 0 else math.inf for node_id, ends in nodes.items()}


def memory_of_node(node_id: str) -> tuple[int | None, int]:
    """Bytes of memory that Ray counts on a node, object store included; and of its object store."""
    listed: Callable[[], list[dict[str, Any]]] = ray.nodes
    for node in listed():
        if node["NodeID"] == node_id:
            resources = node["Resources"]
            store = int(resources.get("object_store_memory", 0))
            memory = int(resources.get("memory", 0))
            return memory + store if memory else None, store
    return None, 0


def kill(name: str, namespace: str) -> None:
    """End an actor for good."""
    actor = find(name, namespace)
    if actor is not None:
        ray.kill(actor, no_restart=True)


def start(
    kind: type, name: str, namespace: str, arguments: tuple[object, ...], node_id: str | None = None
) -> Handle:
    """An actor of the cache, started if there is none. Calls are queued until it runs.

    Args:
        kind: its class.
        name: by which all find it.
        namespace: Ray's.
        arguments: of its class.
        node_id: where it must run. Default: anywhere.
    """
    options: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": 1000,
    }
    if node_id is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    actor_class: Any = ray.remote(kind)
    actor: Handle = actor_class.options(**options).remote(*arguments)
    return actor
