"""The model: converted from the pinned file, published whole or not at all."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from tokenizers import Tokenizer

from serve_apps import gguf, model


def tiny_gguf(path: Path, *, architecture: str = "llama", split: str = "smollm") -> Path:
    """A GGUF without tensors but with the fields that are read before them."""
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_pre(split)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_another_file_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"not the model")
    with pytest.raises(ValueError, match=r"sha256 .* `pip install --force-reinstall"):
        model.smollm2(models=tmp_path / "models", source=source)
    assert not (tmp_path / "models").exists()


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that passes the check."""
    source = tmp_path / "model.gguf"
    source.write_bytes(b"the model")
    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(b"the model").hexdigest())
    return source


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, pinned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, target: Path, dtype: torch.dtype) -> None:
        (target / "model.safetensors").write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(gguf, "convert", fails)
    with pytest.raises(OSError, match="disk full"):
        model.smollm2(models=tmp_path / "models", source=pinned)
    assert list((tmp_path / "models").iterdir()) == []


def test_two_at_once_publish_one(
    tmp_path: Path, pinned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(name: str, then: Callable[[], object] = lambda: None) -> None:
        def write(source: Path, target: Path, dtype: torch.dtype) -> None:
            (target / "config.json").write_text(name)
            then()

        monkeypatch.setattr(gguf, "convert", write)

    def the_other() -> None:
        convert("other")
        model.smollm2(models=tmp_path / "models", source=pinned)

    convert("slow", then=the_other)
    found = model.smollm2(models=tmp_path / "models", source=pinned)
    assert (found / "config.json").read_text() == "other"
    assert [path.name for path in found.parent.iterdir()] == ["smollm2-135m-instruct"]


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "PACKAGE", "lmkv_no_such_package")
    with pytest.raises(FileNotFoundError, match="make demo"):
        model.smollm2(models=tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"architecture": "qwen2"}, "only llama"), ({"split": "qwen2"}, "only smollm")],
)
def test_models_it_does_not_know_are_refused(
    tmp_path: Path, fields: dict[str, str], message: str
) -> None:
    source = tiny_gguf(tmp_path / "x.gguf", **fields)
    with pytest.raises(ValueError, match=message):
        gguf.convert(source, tmp_path, torch.bfloat16)


def test_the_tokenizer_splits_digits(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>user").tokens == ["<|im_start|>", "user"]


def test_the_weights_have_their_names_shapes_and_dtype(smollm2: Path) -> None:
    weights = load_file(smollm2 / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == 134_515_008
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights["model.layers.29.self_attn.k_proj.weight"].shape == (192, 576)
    assert "lm_head.weight" not in weights  # tied to the embedding
