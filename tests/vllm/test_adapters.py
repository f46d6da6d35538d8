"""LoRA adapters are told apart by what is in them, not by what they are called."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm.conftest import engine_on, tokens
from tests.vllm.engine import Answer, Engine
from tests.vllm.local_shard import LocalShard
from tests.vllm.models import make_adapter

pytestmark = pytest.mark.vllm

HIT = 288
SEEDS = itertools.count(100)


@pytest.fixture(scope="module")
def shard() -> Iterator[LocalShard]:
    made = LocalShard(64 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(bfloat16_model: str, shard: LocalShard) -> Iterator[Engine]:
    """One that has room for a single adapter."""
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "max_cpu_loras": 1}
    with engine_on(shard, bfloat16_model, **lora) as made:
        yield made


class World:
    """An engine, and adapters in a directory."""

    def __init__(self, engine: Engine, model: str, directory: Path) -> None:
        self.engine = engine
        self.model = model
        self.directory = directory
        self.prompt = tokens(next(SEEDS), 300)

    def train(self, name: str, seed: int) -> None:
        make_adapter(self.directory / name, self.model, seed)

    def adapter(self, name: str, number: int, **fields: Any) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, number, str(self.directory / name), **fields)

    def load(self, name: str, number: int, **fields: Any) -> None:
        self.engine.llm().llm_engine.add_lora(self.adapter(name, number, **fields))

    def ask(self, name: str, number: int, *, reset: bool = True) -> Answer:
        [answer] = self.engine.generate([self.prompt], lora=self.adapter(name, number))
        self.engine.wait_saved()
        if reset:
            assert self.engine.reset()
        return answer

    def right(self, seed: int) -> Answer:
        """What an adapter of another name, so without any hit, answers."""
        self.train(f"copy-{seed}", seed)
        answer = self.ask(f"copy-{seed}", 1000 + seed)
        assert answer.cached == 0
        return answer


@pytest.fixture
def world(engine: Engine, bfloat16_model: str, tmp_path: Path) -> World:
    core = engine.llm().llm_engine
    for number in core.list_loras():
        core.remove_lora(number)
    made = World(engine, bfloat16_model, tmp_path)
    made.train("mine", 1)
    return made


def copied(world: World, name: str) -> None:
    """One adapter lies somewhere else on another node, and may be called as people like."""
    world.train(name, 1)
    world.load(name, 7)
    world.engine.generate([tokens(5, 40)])
    world.engine.reset()


def same(one: Answer, other: Answer) -> bool:
    return (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


def test_an_adapter_is_found_again_when_vllm_has_loaded_it(world: World) -> None:
    first = world.ask("mine", 1)
    assert first.cached == 0
    assert world.ask("mine", 1).cached == HIT
    [base] = world.engine.generate([world.prompt])
    assert base.cached == 0, "without an adapter it is another text"
    assert not same(base, first)
    world.engine.reset()
    world.train("other", 2)
    world.ask("other", 2)
    world.load("mine", 1)  # as a server does when it is told of an adapter
    world.engine.generate([tokens(1, 40)])
    world.engine.reset()
    assert world.ask("mine", 1).cached == HIT


def in_place(world: World) -> int:
    world.load("mine", 1, load_inplace=True)
    return 1


def unloaded_and_loaded(world: World) -> int:
    world.engine.llm().llm_engine.remove_lora(1)
    world.load("mine", 2)
    return 2


def made_room(world: World) -> int:
    """VLLM reads the path again without a word, as another adapter had its place."""
    world.train("other", 3)
    world.ask("other", 3)
    return 1


@pytest.mark.parametrize("reload", [in_place, unloaded_and_loaded, made_room])
def test_an_adapter_that_was_retrained_is_another_one(
    world: World, shard: LocalShard, reload: Any
) -> None:
    right = world.right(2)
    shard.evict_all()
    first = world.ask("mine", 1)
    assert world.ask("mine", 1).cached == HIT
    world.train("mine", 2)
    number = reload(world)
    again = world.ask("mine", number)
    assert again.cached == 0
    assert not same(again, first)
    hit = world.ask("mine", number)
    assert hit.cached == HIT
    assert same(again, right)
    # The first one is back: so is its KV.
    world.train("mine", 1)
    world.load("mine", number, load_inplace=True)
    world.engine.generate([tokens(2, 40)])
    world.engine.reset()
    back = world.ask("mine", number)
    assert back.cached == HIT
    assert back.tokens == first.tokens


def test_what_continues_an_old_adapters_hit_in_vllms_cache_is_not_kept(
    world: World, shard: LocalShard
) -> None:
    """VLLM does not notice: its own hit is wrong, until its cache is emptied."""
    short, world.prompt = world.prompt, world.prompt + tokens(3, 300)
    world.engine.generate([short], lora=world.adapter("mine", 1))
    world.engine.wait_saved()
    world.train("mine", 2)
    world.load("mine", 1, load_inplace=True)
    world.engine.generate([tokens(4, 40)])
    kept = set(shard.state.chunks)
    polluted = world.ask("mine", 1)
    assert polluted.cached == HIT
    assert set(shard.state.chunks) == kept
    assert world.ask("mine", 1).cached == 0
    assert world.ask("mine", 1).cached == 576


def test_one_adapter_is_one_wherever_it_lies(world: World) -> None:
    first = world.ask("mine", 1)
    copied(world, "theirs")
    copy = world.ask("theirs", 7)
    assert copy.cached == HIT
    assert copy.tokens == first.tokens
    # So for a longer prompt, whose hashes go on while tokens are generated.
    world.prompt += tokens(6, 100)
    [long] = world.engine.generate([world.prompt], max_tokens=40, lora=world.adapter("theirs", 7))
    world.engine.wait_saved()
    world.engine.reset()
    assert long.cached == HIT
    world.prompt += [*long.tokens]
    assert world.ask("theirs", 7).cached == 416


def test_a_file_that_changes_under_a_loaded_adapter_changes_nothing(world: World) -> None:
    first = world.ask("mine", 1)
    world.train("mine", 2)
    again = world.ask("mine", 1)
    assert again.cached == HIT
    assert again.tokens == first.tokens


# -- without an engine ----------------------------------------------------------------------------


def lora(seed: int, scaling: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def layer() -> Any:
        packed = [torch.randn(4, 8, generator=generator), None]
        whole = torch.randn(8, 4, generator=generator)
        return SimpleNamespace(lora_a=packed, lora_b=whole, scaling=[scaling, None])

    return SimpleNamespace(loras={name: layer() for name in ("q", "v")})


def test_a_worker_tells_adapters_by_their_bytes() -> None:
    from lmkv_ray.vllm.worker.adapters_watch import AdapterWatch

    adapters: dict[int, Any] = {}
    manager = SimpleNamespace(list_adapters=lambda: adapters)
    watch = AdapterWatch(SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager)))
    assert not watch.look()
    adapters |= {1: lora(1), 2: lora(1), 3: lora(2), 4: lora(1, scaling=2.0)}
    assert watch.look()
    assert not watch.look()
    digests = {number: digest for number, (_, digest) in watch.table.items()}
    assert digests[1] == digests[2]
    assert len({*digests.values()}) == 3
    before = watch.table[1]
    adapters[1] = lora(1)
    del adapters[3]
    assert watch.look()
    assert watch.table.keys() == {1, 2, 4}
    assert watch.table[1][1] == before[1]
    assert watch.table[1][0] != before[0], "it was loaded again"


def test_an_adapter_is_known_when_all_workers_have_it() -> None:
    from lmkv_ray.vllm.engine.metadata import WorkerReport
    from lmkv_ray.vllm.identity.adapters import Adapters

    adapters = Adapters(workers=2)
    assert adapters.digest(0) == b""
    assert adapters.take(WorkerReport(adapters={0: {1: (1, "a")}})) == {1}
    assert adapters.digest(1) is None
    assert adapters.take(WorkerReport(adapters={1: {1: (1, "b")}})) == {1}
    first = adapters.digest(1)
    assert first
    assert adapters.take(WorkerReport()) == set()
    assert adapters.take(WorkerReport(adapters={1: {1: (2, "c"), 2: (3, "d")}})) == {1, 2}
    assert adapters.digest(1) not in (None, first)
    assert adapters.digest(2) is None
    assert adapters.serials() == {0: {1: 1}, 1: {1: 2, 2: 3}}
    assert adapters.take(WorkerReport(adapters={0: {}, 1: {}})) == {1, 2}
    assert adapters.digest(1) is None
    assert not adapters.replaces("name", b"a")
    assert not adapters.replaces("name", b"a")
    assert adapters.replaces("name", b"b")
