"""What ``ShardState`` tells the shard actor to do to the arena, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from lmkv_ray.messages import MissReason, Owner


@dataclass(frozen=True, slots=True)
class AssignExtent:
    """Cut an extent, which holds no readable chunk, into slots of ``slot_bytes``."""

    extent: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """Mark free slots as being written by ``owner``."""

    slots: tuple[int, ...]
    owner: Owner


@dataclass(frozen=True, slots=True)
class Publish:
    """Make reserved slots readable, under these keys."""

    slots: tuple[int, ...]
    keys: tuple[bytes, ...]
    nbytes: tuple[int, ...]
    spaces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Retire:
    """Make ready slots unreadable; they are free then."""

    slots: tuple[int, ...]
    reason: MissReason


@dataclass(frozen=True, slots=True)
class Free:
    """Reserved slots are free, nothing was published."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Spoil:
    """What is being filled in reserved slots is refused, by a successor too."""

    slots: tuple[int, ...]


Instruction: TypeAlias = AssignExtent | Reserve | Publish | Retire | Free | Spoil
