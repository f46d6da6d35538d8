"""Text that is reused anywhere in the prompt: real engines in float32, where noise cannot hide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lmkv_ray.anywhere.plan import Plan
from lmkv_ray.arena import ArenaReader
from lmkv_ray.messages import MissReason
from lmkv_ray.vllm.scheduler.anywhere import SCHEDULER
from tests.vllm.conftest import engine_on, forget, save_prompt, tokens, wait_for
from tests.vllm.engine import Engine
from tests.vllm.local_shard import LocalShard
from tests.vllm.models import VOCABULARY
from tests.vllm.stored_text import CHUNK, ToldFinder
from tests.vllm.storm import assert_nothing_is_held

pytestmark = [pytest.mark.vllm, pytest.mark.each_vllm]

SYSTEM = tokens(900, 40)
DOCUMENTS = [tokens(901 + i, n) for i, n in enumerate((120, 90, 150, 70, 130))]
QUESTIONS = [tokens(950 + i, 18) for i in range(4)]


def prompt(order: str, question: int = 0, between: int = 0) -> list[int]:
    """System prompt, documents in an order, and a question."""
    made = list(SYSTEM)
    for number in order:
        made += tokens(990, between) + DOCUMENTS[int(number)]
    return made + QUESTIONS[question]


@pytest.fixture(scope="module")
def engine(float32_model: str, shard: LocalShard) -> Iterator[Engine]:
    with engine_on(
        shard,
        float32_model,
        connector={"anywhere": "asked"},
        scheduler_cls=SCHEDULER,
        max_num_batched_tokens=2048,
        max_logprobs=VOCABULARY,
        max_num_seqs=16,
    ) as made:
        yield made


@pytest.fixture
def stored(engine: Engine, shard: LocalShard) -> Iterator[None]:
    """All documents were read in one order, and are in the arena only."""
    set_finder(engine, None)
    forget(engine, shard)
    finder = ToldFinder(engine.connector()._link.readable, DOCUMENTS)
    save_prompt(engine, prompt("01234"))
    finder.learn(engine, prompt("01234"))
    forget_device(engine)
    set_finder(engine, finder)
    yield
    set_finder(engine, None)
    assert_nothing_is_held(engine)
    assert engine.connector().composer._composed == {}


def set_finder(engine: Engine, finder: ToldFinder | None) -> None:
    anywhere = engine.connector()._scheduler.anywhere
    assert anywhere is not None, "it is not active"
    anywhere.finder = finder


def forget_device(engine: Engine) -> None:
    engine.wait_saved()
    assert engine.reset()


def ask(engine: Engine, asked: list[int], wish: Any = True) -> Any:
    return ask_all(engine, [asked], wish)[0]


def ask_all(engine: Engine, asked: list[list[int]], wish: Any = True, max_tokens: int = 3) -> Any:
    """Greedy answers with the log probabilities of the whole vocabulary."""
    from vllm import SamplingParams

    params = None if wish is None else {"kv_transfer_params": {"lmkv": {"anywhere": wish}}}
    outputs = engine.llm().generate(
        [{"prompt_token_ids": its} for its in asked],
        SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            detokenize=False,
            logprobs=VOCABULARY,
            ignore_eos=True,
            extra_args=params,
        ),
        use_tqdm=False,
    )
    engine.drain()
    return outputs


def logits(output: Any) -> list[dict[int, float]]:
    """Of each generated token, the log probabilities of the whole vocabulary."""
    return [
        {token: its.logprob for token, its in step.items()} for step in output.outputs[0].logprobs
    ]


def cold(engine: Engine, shard: LocalShard, asked: list[int]) -> Any:
    """An answer for which everything is computed; the arena is empty then."""
    forget(engine, shard)
    output = ask(engine, asked, False)
    assert not output.num_cached_tokens
    return output


def told(output: Any) -> dict[str, int]:
    """What the answer says of what was reused."""
    answer: dict[str, dict[str, int]] = output.kv_transfer_params or {}
    return answer.get("lmkv", {})


def test_documents_in_another_order_are_reused(engine: Engine, stored: None) -> None:
    asked = prompt("31420", between=7)
    before = engine.counted()
    output = ask(engine, asked)
    documents = sum(map(len, DOCUMENTS))
    assert documents - CHUNK < told(output)["reused"] <= documents
    assert told(output)["recomputed"] >= 4 * 7
    counted = engine.counted()
    reused = counted["reused_tokens"] - before.get("reused_tokens", 0)
    assert reused == told(output)["reused"]
    assert output.num_cached_tokens == 32 + reused, "the system prompt, and what was copied"
    missed = counted[MissReason.COMPOSED] - before.get(MissReason.COMPOSED, 0)
    assert missed + output.num_cached_tokens == len(asked)


@pytest.mark.parametrize("order", ["01234", "31420", "2", "40"])
@pytest.mark.parametrize("first", [0, 4])
def test_all_that_was_copied_computed_again_is_a_cold_run_to_the_bit(
    engine: Engine,
    shard: LocalShard,
    stored: None,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    first: int,
) -> None:
    """Rows see what rows before them wrote in the same step: nothing of the copies is left."""
    asked = prompt(order, between=5)
    with monkeypatch.context() as patch:
        its = Plan._holes
        patch.setattr(
            Plan,
            "holes",
            property(lambda plan: sorted([*its(plan), *((p.dst, p.end) for p in plan.pieces)])),
        )
        again = ask(engine, asked, {"first": first})
    assert told(again)["reused"] > 50
    assert logits(again) == logits(cold(engine, shard, asked))


@pytest.mark.parametrize("first", [0, 4])
def test_text_in_its_own_context_is_an_ordinary_hit_to_the_bit(
    engine: Engine, stored: None, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Unchanged, and forced through pieces and rows: the same as vLLM's hit of a prefix."""
    from lmkv_ray.vllm.scheduler.hits import Loader

    asked = prompt("01234", 1)
    hit = ask(engine, asked, False)
    assert hit.num_cached_tokens > 500
    forget_device(engine)
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "exact", lambda *_: 0)
        patch.setattr(Loader, "match", nothing)
        output = ask(engine, asked, {"first": first})
    assert told(output)["reused"] > 500
    assert logits(output) == logits(hit)


def nothing(loader: Any, tracked: Any, computed: int) -> tuple[int, bool]:
    from lmkv_ray.vllm.scheduler.requests import Claim

    tracked.claim = Claim(computed, computed)
    return 0, False


def test_exact_requests_never_see_what_was_put_together(
    engine: Engine, shard: LocalShard, stored: None
) -> None:
    asked = prompt("31420", between=7)
    ask(engine, asked)
    keys = set(shard.state.chunks)
    exact = [ask(engine, asked, False), ask(engine, prompt("31420", 1, 7), False)]
    assert exact[0].num_cached_tokens == 32
    engine.wait_saved()
    assert len(shard.state.chunks) > len(keys), "what is exact is saved"
    assert logits(exact[0]) == logits(cold(engine, shard, asked))
    assert logits(exact[1]) == logits(cold(engine, shard, prompt("31420", 1, 7)))


def test_nothing_that_was_put_together_is_saved(
    engine: Engine, shard: LocalShard, stored: None
) -> None:
    before = set(shard.state.chunks)
    ask_all(engine, [prompt("31420", between=7)], max_tokens=100)
    engine.wait_saved()
    new = set(shard.state.chunks) - before
    assert len(new) <= 1, "only what stands before the first reused token"


def test_exact_blocks_win_over_stored_text(engine: Engine, stored: None) -> None:
    asked = prompt("31420", between=7)
    exact = ask(engine, asked, False)
    output = ask(engine, asked)
    assert told(output) == {}
    assert output.num_cached_tokens == len(asked) // CHUNK * CHUNK
    assert output.outputs[0].token_ids == exact.outputs[0].token_ids


def test_the_same_documents_in_the_same_order_are_on_the_device(
    engine: Engine, stored: None
) -> None:
    first = ask(engine, prompt("31420", 0, 7))
    again = ask(engine, prompt("31420", 1, 7))
    assert again.num_cached_tokens > first.num_cached_tokens
    forget_device(engine)
    loaded = ask(engine, prompt("31420", 1, 7))
    assert loaded.num_cached_tokens < again.num_cached_tokens
    assert loaded.outputs[0].token_ids == again.outputs[0].token_ids


def test_a_load_that_fails_is_a_cold_run(
    engine: Engine, shard: LocalShard, stored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompt("31420", between=7)
    with monkeypatch.context() as patch:
        patch.setattr(ArenaReader, "unchanged", lambda reader, slots, generations: slots != slots)
        failed = ask(engine, asked)
    assert told(failed) == {}
    after = ask(engine, asked, False)
    expected = cold(engine, shard, asked)
    assert logits(failed) == logits(expected)
    assert after.outputs[0].token_ids == expected.outputs[0].token_ids


def test_many_at_once_are_answered_as_one_by_one(engine: Engine, stored: None) -> None:
    asked = [
        prompt("31420", between=7),
        prompt("012", 1),
        prompt("20", 2, 3),
        tokens(77, 300),
        prompt("31420", 2, 7),
        prompt("4", 3),
        prompt("23", 1),
        prompt("0123", 3, 1),
    ]
    wishes = [ask(engine, its) for its in asked]
    forget_device(engine)
    together = ask_all(engine, asked)
    for alone, its in zip(wishes, together, strict=True):
        assert its.outputs[0].token_ids == alone.outputs[0].token_ids


def test_aborts_leave_nothing(engine: Engine, stored: None) -> None:
    from vllm import SamplingParams

    steps = engine.llm().llm_engine
    params = SamplingParams(
        max_tokens=5,
        detokenize=False,
        ignore_eos=True,
        extra_args={"kv_transfer_params": {"lmkv": {"anywhere": True}}},
    )
    for after in range(6):
        name = f"abort{after}"
        steps.add_request(name, {"prompt_token_ids": prompt("31420", between=after)}, params)
        for _ in range(after):
            steps.step()
        steps.abort_request([name])
        while steps.has_unfinished_requests():
            steps.step()
        engine.drain()
    pool = engine.core().scheduler.kv_cache_manager.block_pool

    def all_is_free() -> bool:
        """VLLM hears of a load that has ended in a step with something to compute."""
        ask(engine, QUESTIONS[0], False)
        return bool(pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)

    wait_for(all_is_free)
