"""vLLM's real scheduler and block manager under random traffic (see ``rows_runner``).

A row that attends to a hole that nothing has filled, or to another request's bytes, makes cells
that differ from those of the same prompt computed alone; and since sampled tokens are made of
cells, its answer differs too.
"""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from lmkv_ray.anywhere.matches import Match, StoredChunk
from lmkv_ray.anywhere.plan import Plan, PlanLimits, plan
from lmkv_ray.vllm.scheduler.composer import Composed, Composer
from lmkv_ray.vllm.scheduler.rows import scheduler as make_scheduler
from tests.vllm.rows_runner import (
    BLOCK,
    VOCABULARY,
    Load,
    Runner,
    alone,
    chain,
    computed_cell,
    copied_cells,
    digest,
)


class Simulation:
    """One scheduler, one runner, and random requests.

    Args:
        model: a directory with a configuration, for vLLM's own.
        seed: decides everything.
        depth: steps in flight.
        v2: which runner's rules.
    """

    def __init__(self, model: str, seed: int, *, depth: int, v2: bool) -> None:
        self.random = random.Random(seed)
        blocks = self.random.choice([45, 80, 200, 1000])
        seats = self.random.choice([3, 5, 8, 32])
        budget = self.random.choice([48, 128, 512])
        self.again = self.random.choice([0.3, 0.9])
        self.aborts = self.random.choice([0.0, 0.03, 0.1])
        self.depth, self.v2 = depth, v2
        config = _config(model, seats, budget, blocks, asynchronous=depth > 1)
        self.scheduler = make_scheduler(
            vllm_config=config,
            kv_cache_config=_cache(blocks),
            structured_output_manager=SimpleNamespace(accept_tokens=lambda *_: True),
            block_size=BLOCK,
            log_stats=False,
        )
        self.scheduler.use_v2_model_runner = v2
        self.budget = budget
        self.connector = self.scheduler.connector
        self.connector.sim = self
        assert self.connector.rows
        limits = PlanLimits(rows=min(64, seats - 1), tokens=budget // 2)
        self.composer = self.connector.composer = Composer(BLOCK, limits, self._given_up)
        self.composed: dict[str, Composed] = {}
        self.runner = Runner(v2, seats)
        self.loading: list[tuple[Load, int]] = []
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.documents = [
            [self.random.randrange(VOCABULARY) for _ in range(self.random.randrange(20, 120))]
            for _ in range(6)
        ]
        self.stored: dict[tuple[int, int], int] = {}
        self.recipes: list[tuple[list[int], list[Match]]] = []
        self.matches: dict[str, list[Match]] = {}
        self.first: dict[str, int] = {}
        self.plans: dict[str, Plan] = {}
        self.answers: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self.in_arena: dict[str, int] = {}
        self.mixed: set[str] = set()
        self.counts: dict[str, int] = dict.fromkeys(
            ("rows", "composed", "checked", "aborted", "preempted", "failed", "given_up"), 0
        )

    # -- what the connector asks ------------------------------------------------------------------

    def exact_in_arena(self, request: Request) -> int:
        most: int = (request.num_tokens - 1) // BLOCK * BLOCK
        return min(self.in_arena[request.request_id], most)

    def compose(self, request: Request) -> None:
        request_id = request.request_id
        made = plan(
            self.exact_in_arena(request),
            self.matches[request_id],
            n=request.num_tokens,
            chunk_tokens=BLOCK,
            first=self.first[request_id],
            limits=self.composer.limits,
        )
        if made is not None:
            self.composed[request_id] = self.composer.compose(request, made)
            self.counts["composed"] += 1

    # -- traffic ----------------------------------------------------------------------------------

    def run(self, requests: int) -> None:
        """Let them come, be aborted, and be answered."""
        flight: deque[Any] = deque()
        coming = requests
        idle = 0
        while coming or self.requests or flight:
            while coming and self.random.random() < 0.4:
                coming -= 1
                self._add(f"r{coming}")
            if self.requests and self.random.random() < self.aborts:
                request_id = self.random.choice(list(self.requests))
                self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
                self.counts["aborted"] += 1
                self._forget(request_id)
            output = self.scheduler.schedule()
            assert output.total_num_scheduled_tokens == sum(output.num_scheduled_tokens.values())
            assert output.total_num_scheduled_tokens <= self.budget
            self.counts["preempted"] += len(output.preempted_req_ids or ())
            self._note_begun(output)
            flight.append(output)
            if len(flight) >= self.depth or not output.total_num_scheduled_tokens:
                while flight:
                    done = flight.popleft()
                    self._execute(done)
                    if output.total_num_scheduled_tokens:
                        break
            idle = 0 if output.total_num_scheduled_tokens or self.loading else idle + 1
            assert idle < 500, "nothing happens any more"
        self._nothing_is_left()

    def _given_up(self) -> None:
        self.counts["given_up"] += 1

    def _add(self, request_id: str) -> None:
        if self.recipes and self.random.random() < self.again:
            tokens, found = self.random.choice(self.recipes[-3:])
        else:
            tokens, found = self._new_recipe()
            self.recipes.append((tokens, found))
        question = [
            self.random.randrange(VOCABULARY) for _ in range(self.random.choice([5, 40, 200]))
        ]
        self.matches[request_id] = found
        self.first[request_id] = self.random.choice([0, 0, 4, 16, 1000])
        exact = self.random.choice([0, 0, 0, 16, 48])
        self.in_arena[request_id] = min(exact, found[0].dst if found else exact)
        request = Request(
            request_id=request_id,
            prompt_token_ids=[*tokens, *question],
            sampling_params=SamplingParams(
                max_tokens=self.random.randrange(1, 30), ignore_eos=True
            ),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        request.sampling_params.update_from_generation_config({}, 0)
        self.requests[request_id] = request
        self.answers[request_id] = []
        self.scheduler.add_request(request)

    def _new_recipe(self) -> tuple[list[int], list[Match]]:
        tokens = [7] * self.random.choice([0, 5, 16, 40])
        found = []
        for number in self.random.sample(range(6), self.random.randrange(0, 6)):
            tokens += [self.random.randrange(VOCABULARY)] * self.random.choice([0, 0, 3, 20])
            donor = self.random.randrange(2)
            at = self.stored.setdefault((number, donor), self.random.randrange(400))
            document = self.documents[number]
            found.append(_match(len(tokens), len(document), at, number * 2 + donor))
            tokens += document
        return tokens, found

    def _note_begun(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            self.counts["rows"] += "-row-" in new.req_id
            its = self.composed.get(new.req_id)
            if its is not None and not its.over:
                self.plans[new.req_id] = its.whole
            elif its is not None and its.exact is not None:
                self.mixed.add(new.req_id)
            if its is not None and its.over:
                self.plans.pop(new.req_id, None)
        for request_id in output.preempted_req_ids or ():
            self.mixed.add(request_id)

    def _execute(self, output: Any) -> None:
        for load in output.kv_connector_metadata.loads:
            self.loading.append((load, self.random.randrange(4)))
        sampled = self.runner.step(output)
        finished, invalid = set(), set()
        waiting = []
        for load, steps in self.loading:
            if steps:
                waiting.append((load, steps - 1))
                continue
            finished.add(load.request_id)
            if self.random.random() < 0.05:
                invalid |= self._fail(load)
            else:
                self._fill(load)
        self.loading = waiting
        ids = list(output.num_scheduled_tokens)
        result = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: i for i, name in enumerate(ids)},
                sampled_token_ids=[[sampled[n]] if n in sampled else [] for n in ids],
                kv_connector_output=KVConnectorOutput(
                    finished_recving=finished or None, invalid_block_ids=invalid
                ),
            ),
        )
        for outputs in result.values():
            for its in outputs.outputs:
                if its.request_id in self.requests:
                    self.answers[its.request_id] += its.new_token_ids
                    if its.finish_reason is not None:
                        self._check(its.request_id)

    def _fill(self, load: Load) -> None:
        cells: dict[int, bytes] = {}
        if load.exact[1] > load.exact[0] and load.request_id in self.requests:
            prompt: list[bytes] = []
            for token in self.requests[load.request_id].all_token_ids[: load.exact[1]]:
                prompt.append(computed_cell(token, chain(prompt)))
            cells |= {i: prompt[i] for i in range(*load.exact)}
        if load.plan is not None:
            cells |= dict(copied_cells(load.plan))
        for position, cell in cells.items():
            self.runner.cells[load.blocks[position // BLOCK], position % BLOCK] = cell

    def _fail(self, load: Load) -> set[int]:
        self.counts["failed"] += 1
        its = self.composed.get(load.request_id)
        self.in_arena[load.request_id] = 0
        first = load.exact[0] if load.plan is None else load.plan.exact
        if self.random.random() < 0.5 and load.exact[1] > load.exact[0]:
            first = load.exact[0]
        self._fill(load)
        for block in load.blocks[first // BLOCK :]:
            for inside in range(BLOCK):
                self.runner.cells[block, inside] = b"torn"
        if its is not None and load.plan is not None:
            self.composer.drop(its, load.plan.exact)
        return set(load.blocks[first // BLOCK :])

    # -- checks -----------------------------------------------------------------------------------

    def _check(self, request_id: str) -> None:
        request, answer = self.requests[request_id], self.answers[request_id]
        assert len(answer) == request.max_tokens
        if request_id not in self.mixed:
            its = self.plans.get(request_id)
            copied = dict(copied_cells(its)) if its is not None else {}
            assert request.prompt_token_ids is not None
            expected = alone(request.prompt_token_ids, answer, copied)
            assert answer == expected, f"{request_id}: {its}"
            self.counts["checked"] += 1
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        del self.requests[request_id]
        self.plans.pop(request_id, None)

    def _nothing_is_left(self) -> None:
        for _ in range(10):
            self._execute(self.scheduler.schedule())
        assert not self.runner.rows, self.runner.rows.keys()
        assert not self.composer._composed
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def _match(dst: int, n: int, stored: int, donor: int) -> Match:
    first, last = stored // BLOCK, -(-(stored + n) // BLOCK)
    chunks = tuple(
        StoredChunk(donor * 1000 + i, 2, digest(donor, i), i * BLOCK) for i in range(first, last)
    )
    return Match(dst, n, chunks, stored - first * BLOCK, dst - stored)


def _config(model: str, seats: int, budget: int, blocks: int, *, asynchronous: bool) -> VllmConfig:
    init_none_hash(sha256)
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = blocks
    model_config = ModelConfig(model=model, skip_tokenizer_init=True, max_model_len=1000)
    return VllmConfig(
        model_config=model_config,
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=seats,
            max_num_batched_tokens=budget,
            max_model_len=1000,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=asynchronous,
        ),
        kv_transfer_config=KVTransferConfig(
            kv_connector="FakeConnector",
            kv_connector_module_path="tests.vllm.rows_runner",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
    )


def _cache(blocks: int) -> KVCacheConfig:
    import torch

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    return KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
