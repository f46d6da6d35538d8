"""What the scheduler half remembers of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from lmkv_ray.hints import Hints
from lmkv_ray.keys import KEY_BYTES, KeyArray, chunk_key, key_array
from lmkv_ray.vllm.groups import Group
from lmkv_ray.vllm.link import StageTicket
from lmkv_ray.vllm.wishes import Wishes, wishes_of

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class FoundChunks:
    """Chunks of one group that are in the arena, from number ``first`` on."""

    group: Group
    first: int
    slots: list[int]
    generations: list[int]


@dataclass(frozen=True, slots=True)
class Claim:
    """What was last answered for a request: after ``computed`` tokens, up to ``end`` can be had."""

    computed: int
    end: int
    arena_id: int = 0
    found: Sequence[FoundChunks] = ()


@dataclass(slots=True)
class TrackedRequest:
    """A request, from its arrival to its end.

    Args:
        request: vLLM's.
        namespace: of the engine.
        groups: of the engine.
    """

    request: Request
    namespace: bytes
    groups: Sequence[Group]
    saved: list[int] = field(init=False)
    """Per group: chunks that need not be considered for saving any more."""
    noted: list[int] = field(init=False)
    """Per group: chunks of which ``DeviceWatch`` has been told."""
    note_at: int = 0
    """Computed tokens from which on there may be more to tell it."""
    never_past: int | None = None
    """Tokens past which nothing is claimed: a load of what follows failed, and could for ever."""
    wishes: Wishes = field(init=False)
    """What the request says about its chunks."""
    tickets: list[StageTicket] = field(default_factory=list)
    claim: Claim | None = None
    counted: bool = False
    _keys: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.wishes = wishes_of(getattr(self.request, "kv_transfer_params", None))
        self.saved = [0] * len(self.groups)
        self.noted = [0] * len(self.groups)
        self._keys = [b""] * len(self.groups)

    def keys(self, group: Group) -> KeyArray:
        """Keys of all whole chunks of known tokens, made as they become known."""
        hashes, keys = self.request.block_hashes, self._keys[group.number]
        known = len(keys) // KEY_BYTES
        now = len(hashes) * group.hash_tokens // group.tokens
        if now > known:
            self._keys[group.number] = keys = keys + b"".join(
                chunk_key(self.namespace, hashes[group.hash_index(i)], group.number)
                for i in range(known, now)
            )
        return key_array(keys)

    def hints(self, group: Group, chunk: int) -> Hints:
        """About one of its chunks."""
        hints = self.wishes.hints()
        if chunk == 0:
            return hints
        return replace(hints, after=self.keys(group)[chunk - 1].tobytes())

    def load_failed(self, token: int) -> None:
        """What was loaded from ``token`` on is no good: do not claim it again, but save it."""
        self.never_past = min(token, self.never_past if self.never_past is not None else token)
        self.saved = [
            min(saved, token // group.tokens)
            for saved, group in zip(self.saved, self.groups, strict=True)
        ]
