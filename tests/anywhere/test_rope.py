"""What vLLM's own rotary embeddings make of a key is what turning it makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmkv_ray.anywhere.rope import Rope, rope_of

LLAMA = ["LlamaForCausalLM"]


def test_what_was_not_tested_is_refused_in_a_sentence() -> None:
    fixed: Any = type("RotaryEmbedding", (), {})()
    for modules, architectures, why in (
        ([fixed], ["NewForCausalLM"], "NewForCausalLM was not tested"),
        ([fixed], [], "this architecture was not tested"),
        ([fixed, fixed], LLAMA, "2 rotary embeddings"),
        ([], LLAMA, "0 rotary embeddings"),
        ([SimpleNamespace()], LLAMA, "SimpleNamespace"),
    ):
        answer = rope_of(modules, architectures)
        assert isinstance(answer, str)
        assert why in answer


def test_an_angle_is_right_at_any_distance() -> None:
    frequencies = 1 / 10000 ** (np.arange(0, 64, 2) / 64)
    rope = Rope(frequencies, 64, True)
    for delta in (0, 1, -7, 131_071, -1_000_000):
        cos, sin = rope.turn(delta)
        assert cos.dtype == sin.dtype == np.float32
        exact = np.exp(1j * frequencies.astype(np.longdouble) * delta)
        assert np.abs(cos - exact.real).max() < 1e-6
        assert np.abs(sin - exact.imag).max() < 1e-6


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("parameters", "halves", "partial"),
    [
        ({}, True, 1.0),
        ({}, False, 1.0),
        ({}, False, 0.5),
        ({"rope_theta": 1e6}, True, 0.25),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
            True,
            1.0,
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
            True,
            1.0,
        ),
    ],
)
def test_turning_is_what_the_model_does(
    parameters: dict[str, Any], halves: bool, partial: float
) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from lmkv_ray.vllm.worker.token_pages import check_rope

    asked = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": partial}
    with set_current_vllm_config(VllmConfig()):
        module = get_rope(
            64, max_position=2048, is_neox_style=halves, rope_parameters=asked | parameters
        )
    rope = rope_of([module], LLAMA)
    assert isinstance(rope, Rope)
    assert (rope.dim, rope.halves) == (int(64 * partial), halves)
    assert check_rope(rope, module) is None
    others = [
        Rope(rope.frequencies * 1.01, rope.dim, rope.halves),
        Rope(rope.frequencies, rope.dim, not rope.halves),
    ]
    for wrong in others:
        assert check_rope(wrong, module) is not None
