"""What the scheduler half remembers of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from msgspec import structs

from lmkv_ray.anywhere.plan import Plan
from lmkv_ray.hints import Hints
from lmkv_ray.keys import KEY_BYTES, KeyArray, chunk_key, key_array, within
from lmkv_ray.tenants import tenant_of
from lmkv_ray.vllm.engine.groups import Bools, Group
from lmkv_ray.vllm.identity.ages import Identity
from lmkv_ray.vllm.identity.unnamed_request import UnnamedRequest
from lmkv_ray.vllm.link.device_watch import BlockRun
from lmkv_ray.vllm.link.ticket import StageTicket
from lmkv_ray.vllm.scheduler.composer import Composed
from lmkv_ray.vllm.scheduler.wishes import NO_WISHES, Wishes

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class FoundChunks:
    """Chunks of one group in the arena of one place, from number ``first`` on."""

    place: int
    arena_id: int
    group: Group
    first: int
    slots: npt.NDArray[np.int64]
    """-1: not there."""
    generations: npt.NDArray[np.uint64]

    @property
    def found(self) -> Bools:
        """bool[n]: which are there."""
        return self.slots >= 0

    def part(self, chunks: range) -> FoundChunks:
        """Some of them."""
        mine = slice(chunks.start - self.first, chunks.start - self.first + len(chunks))
        slots, generations = self.slots[mine], self.generations[mine]
        return replace(self, first=chunks.start, slots=slots, generations=generations)


@dataclass(frozen=True, slots=True)
class Claim:
    """What was last answered for a request: after ``computed`` tokens, up to ``end`` can be had."""

    computed: int
    end: int
    found: Sequence[FoundChunks] = ()
    """One a place and group."""
    plan: Plan | None = None
    """What is put together behind ``end``."""

    @property
    def tokens(self) -> int:
        """Tokens that vLLM need not compute after ``computed``, holes of the plan among them."""
        return (self.plan.resume if self.plan is not None else self.end) - self.computed


@dataclass(slots=True)
class Asked:
    """What other nodes of the engine were asked of a request."""

    computed: int
    limit: int
    """Tokens: chunks from ``computed`` to ``limit``."""
    tickets: dict[tuple[int, int], StageTicket | None] = field(default_factory=dict)
    """By place and group; None: it could not be asked."""
    used: float | None = None
    """``time.monotonic()`` when the answers were first used."""

    @property
    def pending(self) -> bool:
        """Whether answers are under way."""
        return any(ticket is not None and ticket.pending for ticket in self.tickets.values())

    def covers(self, computed: int, limit: int) -> bool:
        """Whether it is about these tokens."""
        return self.computed <= computed and limit <= self.limit

    def found(self, place: int, group: Group, first: int, end: int) -> FoundChunks:
        """What is known of chunks ``first`` to ``end``: a chunk that no answer names is not
        there.
        """
        slots, generations = np.full(end - first, -1), np.zeros(end - first, np.uint64)
        ticket = self.tickets.get((place, group.number))
        reply = ticket.reply if ticket is not None else None
        if reply is None or not reply.slots:
            return FoundChunks(place, 0, group, first, slots, generations)
        begin = self.computed // group.tokens
        low, high = max(first, begin), min(end, begin + len(reply.slots))
        if low < high:
            slots[low - first : high - first] = reply.slots[low - begin : high - begin]
            known = reply.generations[low - begin : high - begin]
            generations[low - first : high - first] = known
        return FoundChunks(place, reply.arena_id, group, first, slots, generations)


@dataclass(slots=True)
class TrackedRequest:
    """A request, from its arrival to its end.

    Args:
        request: vLLM's.
        identity: whose chunks these are.
        groups: the engine's KV groups, in its order.
        wishes: what the request says about its chunks.
    """

    request: Request
    identity: Identity
    groups: Sequence[Group]
    wishes: Wishes = NO_WISHES
    saved: list[list[int]] = field(init=False)
    """[place][group]: chunks that need not be considered for saving any more."""
    noted: list[int] = field(init=False)
    """Per group: chunks of which ``DeviceWatch`` has been told."""
    note_at: int = 0
    """Computed tokens from which on there may be more to tell it."""
    never_past: int | None = None
    """Tokens past which nothing is claimed: a load of what follows failed, and could for ever."""
    tickets: list[StageTicket] = field(default_factory=list)
    asked: Asked | None = None
    """Of other nodes of the engine."""
    claim: Claim | None = None
    composed: Composed | None = None
    """It is, or was to be, put together from stored text."""
    considered: bool = False
    """Whether it may be put together was decided."""
    counted: bool = False
    adapter: bytes | None = b""
    """Digest of its LoRA adapter; empty: it has none; None: not known."""
    mixed: bool = False
    """Whether what it has computed belongs to no age of the engine's identity: it is not saved."""
    _keys: list[list[bytes]] = field(init=False)
    _ends: list[list[bytes]] = field(init=False)
    """[place][group]: the hash that the last of ``_keys`` was made of."""
    _tenant: int = field(init=False)
    _unnamed: UnnamedRequest = field(init=False)

    def __post_init__(self) -> None:
        self._unnamed = UnnamedRequest(self.request)
        # vLLM checks that it is a text where it comes by HTTP.
        self._tenant = tenant_of(str(getattr(self.request, "cache_salt", None) or ""))
        self.start_over()

    def start_over(self) -> None:
        """The engine's identity is another one: what was asked, found and saved counts no more."""
        self.saved = [[0] * len(self.groups) for _ in range(self.identity.places)]
        self.forget_noted()
        self.tickets, self.asked, self.claim = [], None, None
        self._keys = [[b""] * len(self.groups) for _ in range(self.identity.places)]
        self._ends = [[b""] * len(self.groups) for _ in range(self.identity.places)]

    def forget_noted(self) -> None:
        """The request begins, maybe again: what was noted before a preemption may have gone."""
        self.noted, self.note_at = [0] * len(self.groups), 0

    def runs_to_note(self, computed: int) -> list[BlockRun]:
        """Chunks of its first ``computed`` tokens that ``DeviceWatch`` was not told of yet."""
        runs, hashes = [], self.request.block_hashes
        for group in self.groups:
            begin, keys = self.noted[group.number], self.keys(group)
            end = min(computed // group.tokens, len(keys))
            if end > begin:
                first, last = group.hash_index(begin), group.hash_index(end - 1)
                last_blocks = hashes[first : last + 1 : group.tokens // group.hash_tokens]
                runs.append(BlockRun(group.number, keys[begin:end].tobytes(), last_blocks))
                self.noted[group.number] = end
        self.note_at = min((self.noted[g.number] + 1) * g.tokens for g in self.groups)
        return runs

    @property
    def adapter_id(self) -> int:
        """VLLM's number of its LoRA adapter; 0: it has none."""
        lora = self.request.lora_request
        return lora.lora_int_id if lora is not None else 0

    @property
    def known(self) -> bool:
        """Whether its chunks may be looked up and saved now."""
        return self.identity.known and self.adapter is not None

    def keys(self, group: Group, place: int = 0) -> KeyArray:
        """Keys of all whole chunks of known tokens, made as they become known. What is put together
        has none: nothing saves it, looks it up or tells of it.

        There are none before the engine's identity and the request's adapter are known. A streaming
        session drops its last token when more is said: keys of a block with that token are made
        anew, and what other nodes answered about them counts no more.
        """
        if not self.identity.namespaces or self.adapter is None:
            return key_array(b"")
        hashes = self._unnamed.hashes() if self.adapter else self.request.block_hashes
        known = len(self._keys[place][group.number]) // KEY_BYTES
        now = len(hashes) * group.hash_tokens // group.tokens
        if self.composed is not None and self.composed.exact is not None:
            now = min(now, self.composed.exact // group.tokens)
        end = self._ends[place][group.number]
        if known and (now < known or hashes[group.hash_index(known - 1)] != end):
            self._keys[place][group.number], known = b"", 0
            self.tickets, self.asked = [], None
        if now > known:
            namespace = within(self.identity.namespaces[place], self.adapter)
            self._ends[place][group.number] = hashes[group.hash_index(now - 1)]
            self._keys[place][group.number] += b"".join(
                chunk_key(namespace, hashes[group.hash_index(i)], group.number)
                for i in range(known, now)
            )
        return key_array(self._keys[place][group.number])

    def space(self, place: int = 0) -> int:
        """Whose its chunks are; 0: not known yet. See ``tenants``."""
        namespace = self.identity.space(place)
        return namespace and namespace | self._tenant

    def hints(self, group: Group, chunk: int, place: int = 0) -> Hints:
        """About one of its chunks."""
        after = self.keys(group, place)[chunk - 1].tobytes() if chunk else b""
        return structs.replace(self.wishes.hints(), after=after, space=self.space(place))

    def load_failed(self, token: int) -> int:
        """What was loaded from ``token`` on is no good: do not claim it again, but save it.

        Returns:
            how many of the claimed tokens that costs.
        """
        before = self.never_past
        self.never_past = token if before is None else min(token, before)
        self.saved = [
            [min(n, token // group.tokens) for n, group in zip(saved, self.groups, strict=True)]
            for saved in self.saved
        ]
        if self.claim is None:
            return 0
        end = self.claim.end if before is None else min(self.claim.end, before)
        return max(0, end - max(token, self.claim.computed))
