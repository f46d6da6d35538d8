"""An engine over two nodes: a worker and a shard on each; vLLM's part is played by hand.

What the halves say to each other is pickled, as vLLM does.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkv_ray.config import load_settings
from lmkv_ray.keys import chunk_key
from lmkv_ray.messages import Grant, MissReason
from lmkv_ray.vllm.device import DeviceWatch
from lmkv_ray.vllm.groups import Group
from lmkv_ray.vllm.link import ANSWER_SECONDS, Attachment, ShardClient
from lmkv_ray.vllm.metadata import Share, WorkerReport
from lmkv_ray.vllm.places import Place
from lmkv_ray.vllm.scheduler import SchedulerHalf
from lmkv_ray.vllm.slots import Slots
from lmkv_ray.vllm.startup import open_places
from lmkv_ray.vllm.stats import MISSED
from lmkv_ray.vllm.worker import WorkerHalf
from tests.vllm.conftest import wait_for
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

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
        )
        self.half = SchedulerHalf(settings, self.groups, self.places, device)
        self.pool = Pool()
        self.half.bind(self.pool)  # type: ignore[arg-type]
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
        wait_for(lambda: self.step() is None and not self.half.saving)
        self.half.on_finished(request, [table] * len(self.groups))
        for place in self.places:
            wait_for(lambda place=place: place.link.slots.settled)  # type: ignore[misc]
        assert all(block.uses == 0 for block in self.pool.blocks)

    def ask(self, request: Any) -> int:
        """Tokens of a new request's hit, asked until there is an answer."""
        self.half.on_new_request(request)
        return self.match(request)

    def match(self, request: Any) -> int:
        """Tokens of a hit, asked until there is an answer."""
        answers: list[tuple[int | None, bool]] = []

        def answered() -> bool:
            answers.append(self.half.match(request, 0))
            return answers[-1][0] is not None

        wait_for(answered, 2 * (0.2 + ANSWER_SECONDS))
        return answers[-1][0] or 0

    def load(self, request: Any, tokens: int, table: list[int]) -> None:
        """Load what ``ask`` answered."""
        for _, _, page in self.pages:
            page.zero_()
        self.half.admitted(request, [table] * len(self.groups), tokens)
        wait_for(lambda: self.step() is None and self.finished[request.request_id] == 2)

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
        num_computed_tokens=0,
        num_in_flight_tokens=0,
        kv_transfer_params=None,
    )


@pytest.fixture
def near() -> Iterator[LocalShard]:
    made = LocalShard(16 << 20)
    yield made
    made.close()


@pytest.fixture
def far() -> Iterator[LocalShard]:
    made = LocalShard(16 << 20)
    yield made
    made.close()


@pytest.fixture
def engine(near: LocalShard, far: LocalShard) -> Iterator[Engine]:
    made = Engine(near, far)
    yield made
    made.close()


SAVED, LOADED = list(range(1, 9)), list(range(11, 19))


def test_each_node_keeps_its_workers_slices_and_loads_them(
    engine: Engine, near: LocalShard, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    assert len(near.state.chunks) == len(far.state.chunks) == 8
    assert not set(near.state.chunks) & set(far.state.chunks), "other slices have other keys"
    assert 2 * near.state.chunks.nbytes == far.state.chunks.nbytes
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 8 * SIZE
    engine.load(again, 8 * SIZE, LOADED)
    assert engine.right(again, 8 * SIZE, LOADED)
    assert not engine.invalid


def test_a_place_without_layers_of_a_group_keeps_nothing_of_it(
    near: LocalShard, far: LocalShard
) -> None:
    engine = Engine(near, far, MIXED)
    try:
        engine.compute(prompt("a", 1, 8), SAVED)
        assert (len(near.state.chunks), len(far.state.chunks)) == (8, 16)
        again = prompt("b", 1, 8)
        assert engine.ask(again) == 8 * SIZE
        engine.load(again, 8 * SIZE, LOADED)
        assert engine.right(again, 8 * SIZE, LOADED)
        # Of the window the last three blocks are needed: without the sixth on the near node, a hit
        # ends before it; then on the far one the fourth of the others is lost.
        hashes = again.block_hashes
        near.evict([chunk_key(engine.places[0].namespace, hashes[5], 1)])
        assert engine.ask(prompt("c", 1, 8)) == 5 * SIZE
        far.evict([chunk_key(engine.places[1].namespace, hashes[3], 0)])
        last = prompt("d", 1, 8)
        assert engine.ask(last) == 3 * SIZE
        engine.load(last, 3 * SIZE, LOADED)
        assert engine.right(last, 3 * SIZE, LOADED)
    finally:
        engine.close()


def test_another_engine_of_the_same_shape_shares_them(
    engine: Engine, near: LocalShard, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    other = Engine(near, far)
    try:
        again = prompt("b", 1, 8)
        assert other.ask(again) == 8 * SIZE
        other.load(again, 8 * SIZE, LOADED)
        assert other.right(again, 8 * SIZE, LOADED)
    finally:
        other.close()


@pytest.mark.parametrize("loser", ["near", "far"])
def test_a_hit_is_what_all_nodes_have_and_what_one_lacks_is_saved_there(
    loser: str, engine: Engine, near: LocalShard, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    place, shard = (engine.places[0], near) if loser == "near" else (engine.places[1], far)
    hashes = prompt("", 1, 8).block_hashes
    shard.evict([chunk_key(place.namespace, hashes[i]) for i in (5, 6)])
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 5 * SIZE
    engine.load(again, 5 * SIZE, LOADED)
    assert engine.right(again, 5 * SIZE, LOADED)
    assert engine.reasons[MissReason.EVICTED] >= 2 * SIZE
    before = [s.state.counters.committed for s in (near, far)]
    engine.compute(again, LOADED, computed=5 * SIZE)
    assert len(near.state.chunks) == len(far.state.chunks) == 8
    added = [s.state.counters.committed - n for s, n in zip((near, far), before, strict=True)]
    assert added == ([2, 0] if loser == "near" else [0, 2])


def test_a_chunk_that_is_lost_after_the_answer_is_recomputed_and_not_claimed_again(
    engine: Engine, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 8 * SIZE
    hashes = again.block_hashes
    far.evict([chunk_key(engine.places[1].namespace, hashes[i]) for i in (6, 7)])
    engine.load(again, 8 * SIZE, LOADED)
    assert engine.invalid == set(LOADED[6:])
    assert engine.right(again, 6 * SIZE, LOADED)
    assert engine.ask(again) == 6 * SIZE


def test_a_silent_shard_of_another_node_costs_a_hit_and_a_bounded_wait(
    engine: Engine, far: LocalShard
) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    far.frozen.set()
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 0
    engine.half.admitted(again, [LOADED], 0)
    engine.step()
    assert engine.reasons[MissReason.STAGE_TIMEOUT] == 8 * SIZE
    far.frozen.clear()


def test_a_prompt_that_is_new_to_this_node_asks_nobody(
    engine: Engine, near: LocalShard, far: LocalShard
) -> None:
    assert engine.ask(prompt("a", 1, 8)) == 0
    assert near.stages == far.stages == 0


def test_an_answer_is_asked_for_again_when_it_is_old(
    engine: Engine, far: LocalShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request may wait long for free blocks, while its chunks are replaced."""
    engine.compute(prompt("a", 1, 8), SAVED)
    again = prompt("b", 1, 8)
    assert engine.ask(again) == 8 * SIZE
    far.evict_all()
    assert engine.match(again) == 8 * SIZE
    monkeypatch.setattr("lmkv_ray.vllm.far.FRESH_SECONDS", 0.0)
    assert engine.match(again) == 0


def test_a_reset_empties_all_nodes(engine: Engine, near: LocalShard, far: LocalShard) -> None:
    engine.compute(prompt("a", 1, 8), SAVED)
    engine.half.reset()
    wait_for(lambda: not (len(near.state.chunks) or len(far.state.chunks)))


def test_deadlines_are_told_by_the_clock_of_the_shards_node() -> None:
    slots, grant = Slots(4, lambda: None), Grant(slots=[7], deadline=time.monotonic() + 1010)
    slots.welcomed(1, grant, ahead=1000.0)
    taken = slots.take()
    assert taken is not None
    assert taken.deadline == grant.deadline
    slots.welcomed(1, grant, ahead=1020.0)
    assert slots.take() is None


def test_workers_know_the_arena_as_soon_as_one_link_has_it() -> None:
    """Else a save into a slot of this link would be nobody's, and its blocks pinned for ever."""
    attached = SimpleNamespace(attachment=Attachment("/arena", 7, None))
    links: Any = {0: SimpleNamespace(attachment=None), 1: attached}
    ref = Place(0, b"", links, [1, 2], {0: Share((0, 0))}).arena()
    assert ref is not None
    assert ref.arena_id == 7
    attached.attachment = None
    assert Place(0, b"", links, [1, 2], {0: Share((0, 0))}).arena() is None
