"""Real engines share chunks if and only if their weights are the same, byte by byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.vllm.conftest import engine_on, save_prompt, tokens
from tests.vllm.engine import Answer
from tests.vllm.local_shard import LocalShard

pytestmark = pytest.mark.vllm

ROWS = slice(700, 708)
"""Of the embedding, that a fine-tune has changed."""

PROMPT = [*range(690, 720), *tokens(7, 290)]


def fine_tuned(model: str, directory: Path) -> str:
    """A copy of a model in which a few rows of the embedding are others."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][ROWS] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    return str(directory)


def answer(shard: LocalShard, model: str, longest: int = 2048) -> Answer:
    """Of a new engine, whose chunks are then in the shard."""
    with engine_on(shard, model, max_model_len=longest) as engine:
        [given] = engine.generate([PROMPT])
        engine.wait_saved()
        return given


def test_a_fine_tune_of_a_few_rows_hits_nothing_and_a_replica_with_less_room_hits_all(
    bfloat16_model: str, tmp_path: Path, shard: LocalShard
) -> None:
    model = str(shutil.copytree(bfloat16_model, tmp_path / "model"))
    tuned = fine_tuned(model, tmp_path / "tuned")
    with engine_on(shard, model) as engine:
        save_prompt(engine, PROMPT)
        [own] = engine.generate([PROMPT])
    other, replica = answer(shard, tuned), answer(shard, model, longest=1248)
    assert (other.cached, replica.cached) == (0, own.cached)
    assert other.tokens != own.tokens == replica.tokens
    # The same path, overwritten by the fine-tune: what it finds is the fine-tune's.
    shutil.copy(Path(tuned) / "model.safetensors", Path(model) / "model.safetensors")
    overwritten = answer(shard, model)
    assert overwritten.cached == own.cached
    assert overwritten.tokens == other.tokens
