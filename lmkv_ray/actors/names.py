"""What the cache's actors are called in Ray's namespace (``Settings.ray_namespace``)."""

from __future__ import annotations

DIRECTORY = "lmkv-directory"
_SHARD = "lmkv-shard-"


def shard_name(node_id: str) -> str:
    """The actor of a node, which Ray knows by ``node_id``."""
    return _SHARD + node_id


def directory_name(part: int) -> str:
    """A part of the directory; part 0 is the one that people ask."""
    return f"{DIRECTORY}-{part}" if part else DIRECTORY


def is_directory(name: str) -> bool:
    """Whether an actor of this name is a part of the directory."""
    return name == DIRECTORY or name.startswith(f"{DIRECTORY}-")


def is_ours(name: str) -> bool:
    """Whether an actor of this name belongs to a cache."""
    return is_directory(name) or name.startswith(_SHARD)
