"""Places: the nodes that an engine's workers are on.

The slices of a chunk that one node's workers hold are a chunk of their own there: with its own key,
in the arena of that node, known to its shard. So a hit is what all places have, and each is saved
to by itself. Most engines have one place. The first one is always the engine's own node, whose
arena is mapped; the others are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmkv_ray.vllm.engine.metadata import ArenaRef, Share
from lmkv_ray.vllm.identity.ages import Identity
from lmkv_ray.vllm.link.shard_link import ShardLink


@dataclass(frozen=True, slots=True)
class Place:
    """One of them."""

    number: int
    """0: the engine's own node."""
    identity: Identity
    """Of the engine."""
    links: Mapping[int, ShardLink]
    """By group: the link that has slots of its size. A place whose workers have no layer of a group
    (pipeline stages) keeps nothing of it."""
    nbytes: Sequence[int]
    """Per group: bytes of a chunk over the workers of this place."""
    shares: Mapping[int, Share]
    """By the rank of each worker."""

    @property
    def link(self) -> ShardLink:
        """The one chunks are looked up through."""
        return next(iter(self.links.values()))

    @property
    def namespace(self) -> bytes:
        """Digest of the engine's namespace, and of which ranks these are; 16 bytes."""
        return self.identity.namespaces[self.number]

    def arena(self) -> ArenaRef | None:
        """What its workers need to know of the arena; None: it is not there yet."""
        for link in self.links.values():  # all to one shard; whichever came first may order saves
            if (attached := link.attachment) is not None:
                return ArenaRef(attached.path, attached.arena_id, self.shares)
        return None
