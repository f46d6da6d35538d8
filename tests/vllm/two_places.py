"""An engine over two nodes: a worker and a shard on each; vLLM's part is played by hand.

What the halves say to each other is pickled, as vLLM does.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from lmkv_ray.config import load_settings
from lmkv_ray.keys import chunk_key
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.metadata import WorkerReport
from lmkv_ray.vllm.engine.stats import MISSED
from lmkv_ray.vllm.identity.content import ContentThread
from lmkv_ray.vllm.link.device_watch import DeviceWatch
from lmkv_ray.vllm.link.shard_link import ANSWER_SECONDS, ShardClient
from lmkv_ray.vllm.scheduler.half import SchedulerHalf
from lmkv_ray.vllm.scheduler.startup import open_places
from lmkv_ray.vllm.worker.half import WorkerHalf
from tests.vllm.conftest import wait_for
from tests.vllm.local_shard import LocalShard

SIZE, BLOCKS, WIDTH = 16, 40, 64
GROUP = Group(0, block_tokens=SIZE, blocks=1, hash_tokens=SIZE)
WINDOW = replace(GROUP, number=1, window=3 * SIZE + 1)

Layers = Sequence[Sequence[Sequence[str]]]
"""[worker][group]: of two pipeline stages."""
PLAIN: Layers = [[["a"]], [["b", "c"]]]
MIXED: Layers = [[[], ["a"]], [["b"], ["c"]]]
"""The near stage has none of the layers that need everything."""
FAR = "another host"


class Pool:
    """Of vLLM's block pool, the reference counts."""

    def __init__(self) -> None:
        self.blocks = [SimpleNamespace(block_id=i, uses=0) for i in range(BLOCKS)]
        self.null_block = self.blocks[0]
        self.cached_block_hash_to_block: dict[bytes, Any] = {}

    def touch(self, blocks: list[Any]) -> None:
        for block in blocks:
            block.uses += 1

    def free_blocks(self, blocks: Iterator[Any]) -> None:
        for block in blocks:
            block.uses -= 1

    def get_cached_block(self, *_: object) -> None:
        return None


def config(rank: int) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            rank=rank, tensor_parallel_size=1, pipeline_parallel_size=2
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(
            model="staged",
            revision=None,
            dtype="bfloat16",
            seed=0,
            quantization=None,
            max_model_len=512,
            hf_config=SimpleNamespace(to_dict=dict),
        ),
        cache_config=SimpleNamespace(
            kv_cache_layout="LBHNC", cache_dtype="auto", prefix_caching_hash_algo="sha256"
        ),
        load_config=SimpleNamespace(load_format="dummy"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


class Engine:
    """Both halves of an engine with two workers, and what vLLM does around them."""

    def __init__(self, near: LocalShard, far: LocalShard, layers: Layers = PLAIN) -> None:
        settings = load_settings({"copy_threads": 1, "stage_seconds": 0.2})
        self.groups = [GROUP, WINDOW][: len(layers[0])]
        self.pages: list[tuple[Group, str, torch.Tensor]] = []
        self.workers = []
        self.model = torch.nn.Linear(8, 8)
        for rank, by_group in enumerate(layers):
            groups = [SimpleNamespace(layer_names=names) for names in by_group]
            cache: Any = SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=groups)
            worker = WorkerHalf(config(rank), cache, self.groups, settings=settings)
            named = [
                (group, name)
                for group, names in zip(self.groups, by_group, strict=True)
                for name in names
            ]
            pages = torch.zeros(len(named), BLOCKS, 1, SIZE, WIDTH)
            worker.register({name: page for (_, name), page in zip(named, pages, strict=True)})
            self.pages += [
                (group, name, page) for (group, name), page in zip(named, pages, strict=True)
            ]
            self.workers.append(worker)
        here, there = [worker.layout_report() for worker in self.workers]

        def connect(host: str | None) -> ShardClient:
            return near if host is None else far

        device = DeviceWatch()
        self.places = open_places(
            config(0),
            settings,
            self.groups,
            [here, replace(there, host=FAR)],
            replicas=1,
            engine_id="e",
            connect=connect,
            device=device,
            content=ContentThread(config(0), settings),
        )
        self.half = SchedulerHalf(settings, self.groups, self.places, device)
        self.pool = Pool()
        self.half.bind(self.pool)
        self.finished: Counter[str] = Counter()
        self.invalid: set[int] = set()
        self.reasons: Counter[str] = Counter()
        for place in self.places:
            wait_for(lambda place=place: len(place.link.slots) >= 16)  # type: ignore[misc]

    def step(self, request: Any = None, tokens: int = 0, table: list[int] | None = None) -> None:
        """One step of the engine, in which so many tokens of a request are computed."""
        tables = [table] * len(self.groups)
        output: Any = SimpleNamespace(
            total_num_scheduled_tokens=tokens,
            num_scheduled_tokens={request.request_id: tokens} if request else {},
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: tables),
        )
        sent = pickle.dumps(self.half.step(output))
        total = WorkerReport()
        for worker in self.workers:
            orders = pickle.loads(sent)
            worker.begin_loads(orders)
            worker.begin_saves(orders)
            self.finished.update(worker.finished_loads()[0])
            self.invalid |= worker.invalid_blocks()
            if (report := worker.report()) is not None:
                total.aggregate(report)
        self.half.on_report(total)
        if (stats := self.half.take_stats()) is not None:
            for name, tokens_of in stats.data.items():
                if name.startswith(MISSED):
                    self.reasons[name.removeprefix(MISSED)] += tokens_of

    def compute(self, request: Any, table: list[int], computed: int = 0) -> None:
        """Compute a prompt from token ``computed`` on, and let its chunks be saved."""
        for block, block_hash in list(zip(table, request.block_hashes, strict=False)):
            if table.index(block) >= computed // SIZE:
                for _, name, page in self.pages:
                    page[block] = content(name, block_hash)
        request.num_computed_tokens = computed
        self.half.on_new_request(request)
        self.step(request, request.num_tokens - computed, table)

        def saved() -> bool:
            self.step()
            return not self.half.saving

        wait_for(saved)
        self.half.on_finished(request, [table] * len(self.groups))
        for place in self.places:
            wait_for(lambda place=place: place.link.slots.settled)  # type: ignore[misc]
        assert all(block.uses == 0 for block in self.pool.blocks)

    def ask(self, request: Any) -> int:
        """Tokens of a new request's hit, asked until there is an answer."""
        self.half.on_new_request(request)
        return self.match(request)

    def get_model(self) -> torch.nn.Module:
        """As a model runner has it."""
        return self.model

    def match(self, request: Any, computed: int = 0) -> int:
        """Tokens of a hit beyond ``computed``, asked until there is an answer."""
        answers: list[tuple[int | None, bool]] = []

        def answered() -> bool:
            answers.append(self.half.match(request, computed))
            if answers[-1][0] is None:
                self.step()
            return answers[-1][0] is not None

        wait_for(answered, 2 * (0.2 + ANSWER_SECONDS))
        return answers[-1][0] or 0

    def load(self, request: Any, tokens: int, table: list[int]) -> None:
        """Load what ``ask`` answered."""
        for _, _, page in self.pages:
            page.zero_()
        self.half.admitted(request, [table] * len(self.groups), tokens)

        def loaded() -> bool:
            self.step()
            return self.finished[request.request_id] == 2

        wait_for(loaded)

    def right(self, request: Any, tokens: int, table: list[int]) -> bool:
        """Whether all pages of all workers have what was computed once, as far as it is needed."""
        return all(
            torch.equal(page[table[i]], content(name, request.block_hashes[i]))
            for group, name, page in self.pages
            for i in range(group.first_block(0, tokens), tokens // SIZE)
        )

    def close(self) -> None:
        for place in self.places:
            place.link.stop()
        for worker in self.workers:
            worker.shutdown()


def content(layer: str, block_hash: bytes) -> torch.Tensor:
    """What a layer has in a block."""
    seed = int.from_bytes(chunk_key(b"c" * 16, block_hash + layer.encode())[:4], "little")
    return torch.rand(1, SIZE, WIDTH, generator=torch.Generator().manual_seed(seed))


def prompt(name: str, text: int, blocks: int) -> Any:
    """A request whose prompt is so many blocks of a text, and a token."""
    tokens = blocks * SIZE + 1
    return SimpleNamespace(
        request_id=name,
        block_hashes=[bytes([text, i]) * 16 for i in range(blocks)],
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        skip_reading_prefix_cache=False,
        lora_request=None,
        num_computed_tokens=0,
        num_in_flight_tokens=0,
        kv_transfer_params=None,
    )
