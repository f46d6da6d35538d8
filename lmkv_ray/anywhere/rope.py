"""Turning stored keys to another position.

A rotary embedding turns each pair of a key's elements by ``position * frequency``. Turned once more
by ``delta * frequency``, the key is that of ``delta`` positions later: no table of positions, one
angle for each frequency. Scaled variants with one fixed table (Llama 3, YaRN) only have other
frequencies, and maybe a constant factor, which turning keeps. The frequencies come from the module
of the loaded model; variants whose table depends on the length are refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

TESTED = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
"""Architectures (as Hugging Face names them) whose text was reused anywhere in our tests. SmolLM2
and TinyLlama are Llamas."""

FIXED_TABLES = frozenset(
    {
        "RotaryEmbedding",
        "Llama3RotaryEmbedding",
        "YaRNScalingRotaryEmbedding",
    }
)
"""vLLM's classes with one table for all lengths."""

NO_ROPE = ("no_rope_layers", "no_rope_layer_interval", "nope_layer_interval")
"""Fields of configurations of models in which some layers do not rotate."""


@dataclass(frozen=True, slots=True)
class Rope:
    """How a model's keys are rotated."""

    frequencies: npt.NDArray[np.float64]
    """float64[dim / 2], radians a position."""
    dim: int
    """Leading elements of a key that are rotated."""
    halves: bool
    """Element i belongs to element ``i + dim / 2`` (NeoX, Llama), not 2i to 2i + 1 (GPT-J)."""

    def turn(self, delta: int) -> tuple[Floats, Floats]:
        """Cosine and sine for a change of ``delta`` positions, float32[dim / 2] each.

        Made in float64: a change of 100,000 positions costs no digit of float32.
        """
        angles = self.frequencies * delta
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rope_of(modules: Collection[Any], architectures: Collection[str]) -> Rope | str:
    """The rotation of a loaded model.

    Args:
        modules: vLLM's rotary embeddings of this process.
        architectures: of the model's configuration.

    Returns:
        or why its text cannot be reused anywhere: part of a sentence.
    """
    if not architectures or not TESTED.issuperset(architectures):
        names = ", ".join(architectures) or "this architecture"
        return f"{names} was not tested for it (tested: {', '.join(sorted(TESTED))})"
    if len(modules) != 1:
        return f"the model has {len(modules)} rotary embeddings, not one"
    [module] = modules
    kind = type(module).__name__
    if kind not in FIXED_TABLES:
        return f"its rotary embedding ({kind}) is not known to have one table for all lengths"
    base = getattr(module, "scaling_factor", 0) if kind.startswith("YaRN") else module.base
    frequencies = module._compute_inv_freq(base)
    dim, table = int(module.rotary_dim), np.array(frequencies.tolist(), np.float64)
    if table.shape != (dim // 2,) or not np.isfinite(table).all():
        return f"its rotary embedding has frequencies of shape {table.shape} for {dim} elements"
    return Rope(table, dim, bool(module.is_neox_style))
