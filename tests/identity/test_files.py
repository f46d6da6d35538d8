"""Which files of a directory are a model's weights, as vLLM's loaders choose them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmkv_ray.identity import ModelFiles

INDEX = {"metadata": {"total_size": 3}, "weight_map": {"a": "m-1.safetensors"}}


def make(directory: Path, *names: str) -> None:
    for name in names:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(INDEX) if name.endswith(".json") else name
        file.write_text(content)


def chosen(directory: Path, load_format: str = "auto") -> list[str]:
    found = ModelFiles.of(str(directory), load_format=load_format).weights
    return [str(file.relative_to(directory)) for file in found]


@pytest.mark.parametrize(
    ("there", "load_format", "wanted"),
    [
        (["b.safetensors", "a.safetensors", "x.bin"], "auto", ["a.safetensors", "b.safetensors"]),
        (["x.bin", "y.bin", "training_args.bin"], "auto", ["x.bin", "y.bin"]),
        (["a.safetensors", "x.bin"], "npcache", ["x.bin"]),
        (["a.safetensors", "x.pt", "optimizer.pt"], "pt", ["x.pt"]),
        (
            ["a.safetensors", "consolidated.safetensors"],
            "auto",
            ["consolidated.safetensors"],
        ),
        (
            ["a.safetensors", "consolidated.safetensors"],
            "hf",
            ["a.safetensors", "consolidated.safetensors"],
        ),
        (
            ["m-1.safetensors", "more.safetensors", "model.safetensors.index.json"],
            "auto",
            ["m-1.safetensors"],
        ),
        (
            ["a.safetensors", "tower/b.safetensors"],
            "auto",
            ["a.safetensors", "tower/b.safetensors"],
        ),
        (
            [
                "a.safetensors",
                "original/b.pt",
                "checkpoint-50/c.safetensors",
                ".cache/d.bin",
                "lora/adapter_model.safetensors",
            ],
            "auto",
            ["a.safetensors"],
        ),
        (["a.safetensors", "x.bin"], "of_a_plugin", ["a.safetensors", "x.bin"]),
        (["a.safetensors"], "tensorizer", []),
        (["config.json"], "auto", []),
    ],
)
def test_files_are_chosen_as_the_loader_does(
    there: list[str], load_format: str, wanted: list[str], tmp_path: Path
) -> None:
    make(tmp_path, *there)
    assert chosen(tmp_path, load_format) == wanted


def test_a_file_that_was_cut_is_all_its_pieces(tmp_path: Path) -> None:
    make(tmp_path, "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "n-00001-of-00002.gguf")
    found = ModelFiles.of(str(tmp_path / "m-00001-of-00002.gguf")).weights
    assert [file.name for file in found] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


@pytest.mark.parametrize("revision", [None, "main", "c0ffee", "tag"])
def test_a_name_is_found_in_the_download_directory(revision: str | None, tmp_path: Path) -> None:
    repository = tmp_path / "models--some--model"
    make(repository, "snapshots/c0ffee/a.safetensors", "snapshots/decaf/a.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee\n")
    (repository / "refs" / "tag").write_text("decaf")
    found = ModelFiles.of("some/model", revision=revision, download_dir=str(tmp_path)).weights
    commit = "decaf" if revision == "tag" else "c0ffee"
    assert found == (repository / "snapshots" / commit / "a.safetensors",)


def test_a_broken_index_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="not an index of weights"):
        chosen(tmp_path)
