"""Namespaces tell apart whatever makes up chunks of other bytes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.errors import UnsupportedError
from lmkv_ray.keys import Namespace
from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.messages import Owner
from lmkv_ray.vllm.engine.metadata import LayoutReport
from lmkv_ray.vllm.identity.namespace import derive_namespace, hashing
from tests.vllm.two_places import GROUP, config


def digest(*layers: int, ranks: list[int] | None = None) -> bytes:
    """Of an engine whose stages have so many layers."""
    reports = [
        LayoutReport(
            rank,
            "here",
            Owner(pid=1, start=1),
            (ChunkLayout(tuple(Run(i * 512, 64, 64) for i in range(n)), 1, 8),),
            "cpu",
        )
        for rank, n in enumerate(layers)
    ]
    return derive_namespace(config(0), load_settings(), [GROUP], reports, ranks).digest()


def test_engines_that_cut_a_model_otherwise_share_nothing() -> None:
    cuts = [(5,), (1, 3, 1), (1, 1, 3), (3, 1, 1)]
    assert len({digest(*cut) for cut in cuts}) == len(cuts)


def test_nodes_of_an_engine_share_nothing_but_with_the_same_ranks_of_others() -> None:
    first, second, all_ranks = digest(2, 2, ranks=[0]), digest(2, 2, ranks=[1]), digest(2, 2)
    assert len({first, second, all_ranks}) == 3
    assert digest(2, 2, ranks=[1]) == second


@pytest.mark.parametrize(
    ("algorithm", "seed", "warned"),
    [
        ("sha256", None, False),
        ("sha256_cbor", None, False),
        ("xxhash", None, True),
        ("xxhash_cbor", None, True),
        ("xxhash", "7", False),
    ],
)
def test_hashes_that_no_other_engine_has_are_warned_of(
    algorithm: str,
    seed: str | None,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    with caplog.at_level(logging.WARNING):
        assert hashing(algorithm) == f"{algorithm} {seed or ''}"
    assert ("PYTHONHASHSEED" in caplog.text) == warned


def engine(**changes: Any) -> Namespace:
    """Of an engine whose model's configuration has these fields (the length is the engine's)."""
    made = config(0)
    longest = changes.pop("max_model_len", 512)
    quantized = changes.pop("quantization_config", None)
    made.model_config.max_model_len = longest
    made.model_config.original_max_model_len = -1 if changes.pop("fitted", False) else longest
    made.model_config.quantization_config = quantized
    made.model_config.hf_config = SimpleNamespace(to_dict=lambda: changes)
    return derive_namespace(made, load_settings(), [GROUP], [])


@pytest.mark.parametrize("rope", [None, "default", "yarn", "llama3", "linear"])
def test_replicas_that_have_room_for_longer_texts_share(rope: str | None) -> None:
    fields: dict[str, Any] = {"rope_parameters": {"rope_type": rope}} if rope else {}
    assert engine(max_model_len=1248, **fields) == engine(max_model_len=1888, **fields)


def test_replicas_do_not_share_where_the_length_changes_the_bytes() -> None:
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2}}
    assert engine(max_model_len=1248, **dynamic) != engine(max_model_len=1888, **dynamic)
    unknown = {"text_config": {"rope_parameters": {"full": {"rope_type": "of the future"}}}}
    assert engine(max_model_len=1248, **unknown) != engine(max_model_len=1888, **unknown)
    long = {"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 4096}
    assert engine(max_model_len=1248, **long) == engine(max_model_len=4096, **long)
    assert engine(max_model_len=4097, **long) == engine(max_model_len=9000, **long)
    assert engine(max_model_len=4096, **long) != engine(max_model_len=4097, **long)
    llama4 = {"model_type": "llama4_text"}
    assert engine(max_model_len=32768, **llama4) == engine(max_model_len=8192, **llama4)
    assert engine(max_model_len=32768, **llama4) != engine(max_model_len=32769, **llama4)


def test_a_length_that_vllm_found_is_not_the_one_the_model_was_built_for() -> None:
    long = {"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 4096}
    for fields in (long, {"rope_scaling": {"type": "dynamic"}}, {"model_type": "llama4_text"}):
        fitted = [engine(max_model_len=n, fitted=True, **fields) for n in (1248, 1888)]
        assert fitted[0] == fitted[1]
        assert fitted[0] != engine(max_model_len=1248, **fields)
    assert engine(fitted=True) == engine()


def test_layers_that_are_not_quantized_online_are_told_apart() -> None:
    ignored = [["lm_head"], ["lm_head", "model.layers.0"]]
    first, second = (engine(quantization_config={"ignore": each}) for each in ignored)
    assert first.quantization != second.quantization
    assert engine(quantization_config=None).quantization == ""


class _OfAModel:
    def __init__(self) -> None:
        self.heads = {"b", "a"}


def test_a_configuration_with_objects_of_the_models_own_code_is_read() -> None:
    mixed = {"by_layer": {1: "a", "b": 2}, "own": _OfAModel(), "skip": {"x", "y"}}
    assert engine(**mixed) == engine(**mixed)
    assert engine(**mixed) == engine(**(mixed | {"own": _OfAModel()}))
    with pytest.raises(UnsupportedError, match=r"hf_config\.bias .*Next step"):
        engine(bias=lambda x: x)


def test_fields_name_what_differs_and_do_not_tell_the_salt() -> None:
    made = engine(quantization_config={"ignore": ["x" * 100]})
    told = msgspec.structs.replace(made, salt="secret", options={"model_config.runner": "auto"})
    fields = told.fields()
    assert fields["model_config.runner"] == "auto"
    assert fields["salt"] != made.fields()["salt"]
    assert "secret" not in str(fields)
    assert max(len(text) for text in fields.values()) <= 64
