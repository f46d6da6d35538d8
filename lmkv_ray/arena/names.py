"""What the arenas of a cache are called."""

from __future__ import annotations

from hashlib import blake2b


def arena_name(ray_namespace: str, node_id: str) -> str:
    """What successors of a shard find its arena by; no two caches on one host share it."""
    return f"{arena_family(ray_namespace)}.{node_id}"


def arena_family(ray_namespace: str) -> str:
    """What the names of all arenas of a cache begin with, up to a dot."""
    return blake2b(ray_namespace.encode(), digest_size=4).hexdigest()
