"""Weights that change while the engine runs: seen by the workers, and KV of others is not found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lmkv_ray.vllm.engine.metadata import WorkerReport
from lmkv_ray.vllm.identity.ages import Identity
from lmkv_ray.vllm.identity.generation import CHECK_SECONDS, Generation
from lmkv_ray.vllm.worker.weights_watch import WeightsWatch
from tests.vllm.conftest import engine_on, save_prompt, tokens
from tests.vllm.engine import Engine, EngineProcess
from tests.vllm.local_shard import LocalShard
from tests.vllm.models import make_model
from tests.vllm.test_identity import namespace, owners

pytestmark = pytest.mark.vllm


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        torch.nn.Linear(64, 33, dtype=torch.bfloat16), torch.nn.BatchNorm1d(7)
    )
    made.register_buffer("scratch", torch.zeros(4), persistent=False)
    pack(made)
    return made


def double(made: Any) -> None:
    with torch.no_grad():
        made[0].weight.mul_(2)


def double_data(made: Any) -> None:
    made[0].weight.data.mul_(2)


def replace(made: Any) -> None:
    made[0].weight = torch.nn.Parameter(made[0].weight.detach() * 2)


def pack(made: Any) -> None:
    made[0].cpu_linear = lambda x: x


def calibrate(made: Any) -> None:
    made[1].running_mean.fill_(3)


@pytest.mark.parametrize("change", [double, double_data, replace, pack, calibrate])
def test_every_kind_of_write_is_suspected_and_read(change: Callable[[Any], None]) -> None:
    made = model()
    watch = WeightsWatch([made])
    assert not watch.suspicious(samples=True)
    assert watch.check() == ""
    change(made)
    assert watch.suspicious(samples=True)
    name = watch.check()
    assert name
    assert not watch.suspicious(samples=True), "it was looked at"
    assert watch.check() == name


def test_equal_weights_have_one_name_and_the_first_ones_none() -> None:
    one: Any = model()
    other = model()
    watches = [WeightsWatch([one]), WeightsWatch([other])]
    double(one)
    double_data(other)
    assert watches[0].check() == watches[1].check() != ""
    one[0].weight.data.div_(2)
    assert watches[0].check() == ""


def test_scratch_is_no_weight_and_packings_that_are_replaced_equal_nothing() -> None:
    made: Any = model()
    watch = WeightsWatch([made])
    made.scratch.fill_(1)
    assert not watch.suspicious(samples=True)
    assert watch.check() == ""
    names = set()
    for _ in range(2):
        pack(made)
        names.add(watch.check())
    assert len(names - {""}) == 2


@pytest.mark.parametrize("at", [0, 1, 2, 3, 7, 8, 1000, 2110])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_single_bit_anywhere_changes_the_sum(at: int, bit: int) -> None:
    made: Any = torch.nn.Linear(64, 33, bias=False)
    made.weight = torch.nn.Parameter(torch.zeros(2111, dtype=torch.uint8), requires_grad=False)
    watch = WeightsWatch([made])
    made.weight.data[at] ^= 1 << bit
    assert watch.check()


def test_two_signs_that_swap_change_the_sum() -> None:
    """Differences in the highest bit of a product cancel each other."""
    made: Any = torch.nn.Linear(64, 64, bias=False)
    watch = WeightsWatch([made])
    made.weight.data[3, 1] *= -1
    made.weight.data[5, 1] *= -1
    assert watch.check()


def test_a_model_that_is_not_found_has_new_weights_each_time() -> None:
    watch = WeightsWatch([])
    assert watch.check() != watch.check()


class Told:
    """A generation, with workers and a clock that do as they are told."""

    def __init__(self, workers: int = 2) -> None:
        self.identity = Identity([namespace()])
        self.identity.adopt()
        self.now = 0.0
        self.generation = Generation(self.identity, workers, lambda: self.now)

    def report(self, number: int, *names: str, suspicious: bool = False) -> None:
        weights = {rank: (number, name) for rank, name in enumerate(names)}
        self.generation.take(WorkerReport(suspicious=suspicious, weights=weights))
        self.identity.adopt()


def test_workers_are_asked_once_when_a_request_wants_to_know() -> None:
    told = Told()
    assert not told.generation.wanted()
    told.generation.doubt()
    assert not told.identity.known, "at once"
    assert told.generation.order() == 0, "later is better"
    assert told.generation.wanted()
    number = told.generation.order()
    assert number
    assert told.generation.order() == 0
    told.generation.take(WorkerReport(weights={0: (number, "")}))
    told.identity.adopt()
    assert not told.identity.known, "one has not answered"
    told.report(number, "", "")
    assert (told.identity.known, told.identity.age) == (True, 1)
    assert not told.generation.wanted()


def test_an_answer_from_before_the_last_doubt_counts_for_nothing() -> None:
    told = Told()
    told.generation.doubt()
    told.generation.wanted()
    number = told.generation.order()
    told.generation.doubt()
    told.report(number, "", "")
    assert not told.identity.known
    told.generation.wanted()
    told.report(told.generation.order(), "", "new")
    assert (told.identity.known, told.identity.age) == (True, 2)


def test_other_weights_are_another_age_and_the_old_ones_their_old_namespace() -> None:
    told = Told()
    before = told.identity.namespaces
    for names, same in ((("a", "a"), False), (("", ""), True), (("a", ""), False)):
        told.generation.doubt()
        told.generation.wanted()
        told.report(told.generation.order(), *names)
        assert (told.identity.namespaces == before) is same


def test_what_workers_suspect_is_a_doubt_unless_there_is_one() -> None:
    told = Told()
    told.report(0, suspicious=True)
    assert not told.identity.known
    told.generation.wanted()
    number = told.generation.order()
    told.report(0, suspicious=True)
    told.report(number, "", "")
    assert not told.identity.known, "the suspicion came after the order"
    told.generation.wanted()
    told.report(told.generation.order(), "", "")
    assert told.identity.known


def test_weights_that_are_back_may_have_been_others_meanwhile() -> None:
    told = Told()
    assert told.generation.take(WorkerReport(suspicious=True))
    told.generation.wanted()
    number = told.generation.order()
    back = WorkerReport(weights=dict.fromkeys(range(2), (number, "")))
    assert not told.generation.take(back), "what comes now is sound"


def test_nobody_waits_for_an_answer_for_ever() -> None:
    told = Told()
    told.generation.doubt()
    assert told.generation.wanted()
    told.now = CHECK_SECONDS
    assert not told.generation.wanted()


# -- a real engine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shard() -> Iterator[LocalShard]:
    made = LocalShard(64 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(bfloat16_model: str, shard: LocalShard) -> Iterator[Engine]:
    with engine_on(shard, bfloat16_model) as made:
        yield made


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("retrained"), "bfloat16", seed=1)


def scale(worker: Any, factor: float) -> None:
    for name, parameter in worker.model_runner.get_model().named_parameters():
        if "norm" in name:
            parameter.data.mul_(factor)


def write(engine: Engine, factor: float) -> None:
    """As a trainer does that has a callable run in the workers."""
    engine.llm().collective_rpc(scale, args=(factor,))


def keys(shard: LocalShard) -> set[bytes]:
    return set(shard.state.chunks)


@pytest.mark.parametrize("connector", [False, True])
def test_a_reset_costs_no_hit_and_clears_nothing(
    engine: Engine, shard: LocalShard, connector: bool
) -> None:
    prompt = tokens(1 + connector, 300)
    save_prompt(engine, prompt)
    kept = keys(shard)
    assert engine.reset(connector=connector)
    assert engine.generate([prompt])[0].cached == 288
    assert keys(shard) == kept


def test_a_pause_or_sleep_of_one_replica_costs_nobody_a_chunk(
    engine: Engine, shard: LocalShard
) -> None:
    prompt = tokens(3, 300)
    save_prompt(engine, prompt)
    kept = keys(shard)
    engine.core().pause_scheduler()
    engine.core().resume_scheduler()
    engine.core().sleep(1)
    engine.core().wake_up()
    assert keys(shard) == kept
    assert engine.generate([prompt])[0].cached == 288, engine.counted()


@pytest.mark.parametrize(
    ("reset", "factor"), [("before", 2.0), ("after", 4.0), ("connector", 8.0), ("never", 16.0)]
)
def test_kv_of_weights_that_were_overwritten_is_neither_found_nor_added_to(
    engine: Engine, shard: LocalShard, reset: str, factor: float
) -> None:
    prompt = tokens(10 + len(reset), 600)
    save_prompt(engine, prompt[:300])
    [first] = engine.generate([prompt])
    engine.wait_saved()
    assert engine.reset()
    if reset != "before":
        engine.generate([tokens(20 + len(reset), 40)])  # what a reset has put in doubt is known
    write(engine, factor)
    if reset in ("after", "connector"):
        assert engine.reset(connector=reset == "connector")
    old = keys(shard)
    [answer] = engine.generate([prompt])
    engine.wait_saved()
    assert answer.logprobs == engine.generate([prompt])[0].logprobs, "its own KV, then"
    assert (answer.tokens, answer.logprobs) != (first.tokens, first.logprobs)
    assert reset == "never" or answer.cached == 0
    # What an engine with the weights on disk can find is what there was.
    space = engine.connector()._scheduler._identity.space(0)
    assert owners(shard, keys(shard) - old) <= {space}
    assert space not in owners(shard, old)
    write(engine, 1 / factor)
    engine.reset()
    [again] = engine.generate([prompt])
    assert again.cached == 576, "the weights of before, and what was saved with them"
    assert again.tokens == first.tokens


def test_reloaded_weights_are_others_and_right(
    engine: Engine, shard: LocalShard, bfloat16_model: str, retrained: str
) -> None:
    prompt = tokens(5, 300)
    save_prompt(engine, prompt)
    engine.llm().collective_rpc("reload_weights", kwargs={"weights_path": retrained})
    engine.reset()
    [answer] = engine.generate([prompt])
    alone = EngineProcess(retrained)
    [right] = alone.call("generate", [prompt])
    alone.close()
    assert answer.cached == 0
    assert answer.tokens == right.tokens
    engine.wait_saved()
    assert engine.reset()
    assert engine.generate([prompt])[0].cached == 288, "its own are found again"
