"""A model runner whose KV cache is a dictionary, and the connector that orders its copies.

What a cell holds says all that it depends on: a computed one its token and a digest of all cells
before it, a copied one where it was copied from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)
from vllm.v1.request import Request

from lmkv_ray.anywhere.plan import Plan
from lmkv_ray.vllm.scheduler.composer import Composer

if TYPE_CHECKING:
    from tests.vllm.rows_simulation import Simulation

BLOCK = 16
VOCABULARY = 1000


def digest(*parts: object) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=12).digest()


def token_of(cells: bytes) -> int:
    return int.from_bytes(cells[:4], "big") % VOCABULARY


@dataclass
class Load:
    """Orders to fill blocks."""

    request_id: str
    blocks: list[int]
    exact: tuple[int, int]
    """Tokens that come from the arena as an exact prefix."""
    plan: Plan | None


class Orders(KVConnectorMetadata):  # type: ignore[misc]
    def __init__(self, loads: list[Load]) -> None:
        self.loads = loads


class FakeConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Of the real connector what concerns composed requests, with matches that are handed in."""

    composer: Composer | None = None
    rows = False
    sim: Simulation

    def __init__(self, config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(config, role, kv_cache_config)
        self.orders: list[Load] = []
        self.answers: dict[str, tuple[int, int, Plan | None]] = {}

    def on_new_request(self, request: Request) -> None:
        self.sim.compose(request)

    def get_num_new_matched_tokens(self, request: Request, computed: int) -> Any:
        assert self.composer is not None
        if self.composer.unfinished(request, computed):
            return None, False
        its = self.sim.composed.get(request.request_id)
        limit = self.sim.exact_in_arena(request)
        if its is not None and its.exact is not None:
            limit = min(limit, its.exact)
        end = max(computed, limit)
        plan = self.composer.claim(its, computed, end) if its is not None else None
        resume = plan.resume if plan is not None else end
        self.answers[request.request_id] = computed, end, plan
        return resume - computed, resume > computed

    def update_state_after_alloc(self, request: Request, blocks: Any, tokens: int) -> None:
        if tokens:
            computed, end, plan = self.answers[request.request_id]
            [table] = blocks.get_block_ids()
            self.orders.append(Load(request.request_id, list(table), (computed, end), plan))
            if plan is not None:
                self.sim.composed[request.request_id].loading = True

    def build_connector_meta(self, output: Any) -> Any:
        orders, self.orders = self.orders, []
        return Orders(orders)

    def request_finished(self, request: Request, block_ids: list[int]) -> Any:
        assert self.composer is not None
        its = self.sim.composed.pop(request.request_id, None)
        if its is not None:
            pool = self.sim.scheduler.kv_cache_manager.block_pool
            pool.evict_blocks(set(self.composer.finished(its, (block_ids,))))
        return False, None

    def start_load_kv(self, *_: Any, **__: Any) -> None: ...
    def wait_for_layer_load(self, *_: Any) -> None: ...
    def save_kv_layer(self, *_: Any, **__: Any) -> None: ...
    def wait_for_save(self) -> None: ...


@dataclass
class Runner:
    """A worker's side: its requests, by the rules of one of vLLM's model runners."""

    v2: bool
    seats: int
    cells: dict[tuple[int, int], bytes] = field(default_factory=dict)
    rows: dict[str, _Row] = field(default_factory=dict)

    def step(self, output: Any) -> dict[str, int]:
        """Execute a step; sampled tokens of those that sample."""
        for request_id in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self.rows.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            tokens = list(new.prefill_token_ids or new.prompt_token_ids)
            [blocks] = new.block_ids
            prompt = len(new.prompt_token_ids)
            self.rows[new.req_id] = _Row(tokens, list(blocks), new.num_computed_tokens, prompt)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            new_blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                assert not self.v2
                tokens = list(cached.all_token_ids[request_id])
                self.rows[request_id] = _Row(
                    tokens, list(new_blocks[0]), cached.num_computed_tokens[i], len(tokens)
                )
                continue
            row = self.rows[request_id]
            row.blocks += list(new_blocks[0]) if new_blocks else []
            if not self.v2:
                row.computed = cached.num_computed_tokens[i]
        assert len(self.rows) <= self.seats, "more requests than the runner has rows"
        work = []
        for request_id, n in output.num_scheduled_tokens.items():
            row = self.rows[request_id]
            work += [(row.computed + i, row) for i in range(n)]
        for position, row in sorted(work, key=lambda its: its[0]):
            row.compute(position, self.cells)
        sampled = {}
        for request_id, n in output.num_scheduled_tokens.items():
            row = self.rows[request_id]
            row.computed += n
            if row.computed >= len(row.tokens):
                sampled[request_id] = token_of(row.before(row.computed, self.cells))
                row.tokens.append(sampled[request_id])
        return sampled


@dataclass
class _Row:
    tokens: list[int]
    blocks: list[int]
    computed: int
    prompt: int

    def at(self, position: int) -> tuple[int, int]:
        return self.blocks[position // BLOCK], position % BLOCK

    def before(self, position: int, cells: dict[tuple[int, int], bytes]) -> bytes:
        """Digest of all cells before a position."""
        return chain(cells.get(self.at(i), b"empty") for i in range(position))

    def compute(self, position: int, cells: dict[tuple[int, int], bytes]) -> None:
        cells[self.at(position)] = computed_cell(
            self.tokens[position], self.before(position, cells)
        )


def chain(cells: Iterable[bytes]) -> bytes:
    return digest(b"".join(cells))


def computed_cell(token: int, before: bytes) -> bytes:
    return digest("computed", token, before)


def copied_cells(plan: Plan) -> Iterator[tuple[int, bytes]]:
    """Position and content of all that a plan copies."""
    for piece in plan.pieces:
        for i in range(piece.n):
            at, inside = divmod(piece.lead + i, BLOCK)
            yield piece.dst + i, digest("copied", piece.chunks[at].key, inside, piece.delta)


def alone(prompt: Sequence[int], answer: Sequence[int], copied: dict[int, bytes]) -> list[int]:
    """What a prompt is answered when nothing else happens."""
    tokens = list(prompt)
    cells: list[bytes] = []
    made: list[int] = []
    while len(made) < len(answer):
        for position in range(len(cells), len(tokens)):
            cells.append(copied.get(position) or computed_cell(tokens[position], chain(cells)))
        made.append(token_of(chain(cells)))
        tokens.append(made[-1])
    return made
