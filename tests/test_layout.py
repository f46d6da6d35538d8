"""Layouts are derived from strides alone: every KVCacheLayout of vLLM, checked against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.errors import UnsupportedError
from lmkv_ray.layout import ChunkLayout, PageView, derive_layout

# (L, B, H, N, C) in order of decreasing stride.
LAYOUTS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]


def engine_views(
    name: str, sizes: dict[str, int], pad: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One allocation in the physical order ``name``, and each layer's [B, H, N, C] view of it."""
    physical = [sizes[d] + (pad if d == "N" and name.index("N") < 3 else 0) for d in name]
    storage = torch.arange(int(np.prod(physical)), dtype=torch.int16)
    logical = storage.view(physical).permute([name.index(d) for d in "LBHNC"])
    logical = logical[:, :, :, : sizes["N"]]
    return storage, [logical[i] for i in range(sizes["L"])]


def page_views(layers: list[torch.Tensor]) -> list[PageView]:
    return [
        PageView(
            layer=f"layer.{i}",
            shape=tuple(t.shape),
            strides=tuple(s * t.element_size() for s in t.stride()),
            itemsize=t.element_size(),
            offset=int(t.storage_offset()) * t.element_size(),
        )
        for i, t in enumerate(layers)
    ]


def block_bytes(layout: ChunkLayout, storage: torch.Tensor, block: int) -> list[bytes]:
    memory = storage.numpy().tobytes()
    starts = (run.offset + block * run.stride for run in layout.runs)
    return [memory[s : s + r.nbytes] for s, r in zip(starts, layout.runs, strict=True)]


sizes = st.fixed_dictionaries({d: st.integers(1, 4) for d in "LBHNC"})


@given(st.sampled_from(LAYOUTS), sizes, st.integers(0, 2))
def test_runs_cover_every_element_of_a_block_once(
    name: str, sizes: dict[str, int], pad: int
) -> None:
    storage, layers = engine_views(name, sizes, pad)
    layout = derive_layout(page_views(layers), num_blocks=sizes["B"], blocks=2)
    for block in range(sizes["B"]):
        found = np.frombuffer(b"".join(block_bytes(layout, storage, block)), np.int16)
        expected = np.concatenate([layer[block].flatten().numpy() for layer in layers])
        assert sorted(found) == sorted(expected)
    assert layout.chunk_bytes == 2 * layout.block_bytes
    assert layout.run_offsets() == [
        2 * sum(r.nbytes for r in layout.runs[:i]) for i in range(len(layout.runs))
    ]


@pytest.mark.parametrize(
    ("name", "runs"), [("LBHNC", 3), ("LBNHC", 3), ("LHBNC", 6), ("BLHNC", 1), ("BLNHC", 1)]
)
def test_neighbouring_runs_are_merged(name: str, runs: int) -> None:
    _, layers = engine_views(name, {"L": 3, "B": 4, "H": 2, "N": 16, "C": 8})
    layout = derive_layout(page_views(layers), num_blocks=4, blocks=1)
    assert len(layout.runs) == runs


def test_kernel_blocks_are_whole_blocks_again() -> None:
    _, layers = engine_views("LBHNC", {"L": 2, "B": 8, "H": 2, "N": 16, "C": 8})
    whole = derive_layout(page_views(layers), num_blocks=4, blocks=1)
    assert [r.nbytes for r in whole.runs] == [2 * 2 * 16 * 8 * 2] * 2


def test_digest_depends_on_the_cut_and_not_on_the_size_of_the_cache() -> None:
    def digest(name: str, blocks: int) -> str:
        _, layers = engine_views(name, {"L": 2, "B": blocks, "H": 2, "N": 16, "C": 8})
        return derive_layout(page_views(layers), num_blocks=blocks, blocks=1).digest()

    assert digest("LBHNC", 4) == digest("LBHNC", 9)
    assert digest("LBHNC", 4) != digest("BLHNC", 4)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((7, 2, 16), (64, 32, 2)),  # rows are no multiple of the blocks
        ((8, 2, 16), (32, 32, 2)),  # blocks overlap
        ((8, 2, 16), (0, 32, 2)),  # a broadcast view
        ((8,), (2,)),  # no page at all
    ],
)
def test_unknown_strides_are_refused_by_name(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    view = PageView("layer.0", shape, strides, 2, 0)
    with pytest.raises(UnsupportedError, match=r"layer\.0.*Next step"):
        derive_layout([view], num_blocks=4, blocks=1)
