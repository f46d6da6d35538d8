"""Backends that fill pages of one shape and layout name differently have chunks of their own."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.engine.metadata import LayoutReport
from lmkv_ray.vllm.engine.versions import vllm_version
from lmkv_ray.vllm.worker.half import WorkerHalf
from lmkv_ray.vllm.worker.page_format import PLAIN, READ_IN, Platform, packing_of, this_platform

pytestmark = pytest.mark.vllm

FP8 = "torch.float8_e4m3fn"
CUDA = Platform("cuda", FP8, shuffles=False, version=READ_IN)
ROCM = replace(CUDA, name="rocm")
SHUFFLING = replace(ROCM, shuffles=True)
MI300 = replace(ROCM, fp8="torch.float8_e4m3fnuz")

FLASH = "flash_attn.FlashAttentionImpl"
FLASHINFER = "flashinfer.FlashInferImpl"
TRITON = "triton_attn.TritonAttentionImpl"
AITER = "rocm_aiter_fa.AiterFlashAttentionImpl"
UNIFIED = "rocm_aiter_unified_attn.RocmAiterUnifiedAttentionImpl"
NATIVE = "rocm_attn.RocmAttentionImpl"
SEGMENTED = "rocm_segmented_attn.RocmSegmentedAttentionImpl"
B12X = "b12x.B12xPagedAttentionImpl"


def layer(
    impl: str, *, dtype: str = "auto", of: str = "vllm.model_executor.layers.attention.attention"
) -> object:
    """A layer whose pages are written by this class of vLLM's attention backends."""
    module, cls = impl.rsplit(".", 1)
    where = f"vllm.v1.attention.backends.{module}"

    def write() -> None: ...

    write.__module__, write.__qualname__ = where, f"{cls}.do_kv_cache_update"
    backend = SimpleNamespace(
        __module__=where, __qualname__=f"{cls}Backend", get_name=lambda: "FLASH_ATTN"
    )
    made = type("Attention", (), {"__module__": of, "get_attn_backend": lambda _: backend})()
    made.impl = type(cls, (), {"do_kv_cache_update": write})()
    made.kv_cache_dtype = dtype
    return made


def packing(impl: str, platform: Platform = ROCM, **of: str) -> str:
    return packing_of([layer(impl, **of)], platform)


def test_backends_of_amd_with_pages_of_one_shape_are_apart() -> None:
    """All of them publish two head slots, so that shapes, strides and layout names are the same."""
    found = [packing(impl, SHUFFLING) for impl in (NATIVE, SEGMENTED, AITER)]
    assert "" not in found
    assert len(set(found)) == 3
    assert packing(B12X, CUDA) not in ("", packing(FLASHINFER, CUDA))


def test_backends_that_write_the_same_bytes_share_them() -> None:
    for impl in (FLASH, FLASHINFER, TRITON):
        assert packing(impl, CUDA) == ""
    for impl in (TRITON, UNIFIED, AITER):
        assert packing(impl, ROCM) == ""
    assert packing(TRITON, SHUFFLING) == packing(UNIFIED, SHUFFLING) == "", "only AITER shuffles"
    assert packing_of([layer(FLASH)] * 40, CUDA) == ""


def test_eight_bit_floats_of_two_formats_are_apart() -> None:
    here, there = (packing(TRITON, platform, dtype="fp8") for platform in (ROCM, MI300))
    assert here != there
    assert here == packing(FLASH, CUDA, dtype="fp8"), "and those of one format are not"
    assert packing(TRITON, MI300) == "", "other dtypes do not care"


def test_what_was_not_read_is_named() -> None:
    assert "MyImpl" in packing("elsewhere.MyImpl", CUDA)
    assert packing(FLASH, replace(CUDA, version=(0, 29))) != packing(
        TRITON, replace(CUDA, version=(0, 29))
    ), "the table is of one version"
    assert "inkling" in packing(FLASH, CUDA, of="vllm.models.inkling"), "a layer that may write"
    assert packing(TRITON, CUDA, dtype="int4_per_token_head") != ""
    four_bits = [layer(FLASHINFER, dtype="nvfp4") for _ in range(2)]
    four_bits[0].impl.nvfp4_fa2 = True  # type: ignore[attr-defined]
    assert packing_of(four_bits[:1], CUDA) != packing_of(four_bits[1:], CUDA)
    assert packing_of([object()], CUDA) != "", "a layer that is nothing we know"


def test_the_order_of_layers_counts() -> None:
    one, other = layer(NATIVE), layer(SEGMENTED)
    assert packing_of([one, one, other], ROCM) != packing_of([other, one, one], ROCM)


def report(impl: str, monkeypatch: pytest.MonkeyPatch, platform: Platform) -> LayoutReport:
    monkeypatch.setattr("lmkv_ray.vllm.worker.half.this_platform", lambda: platform, raising=False)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=0),
        device_config=SimpleNamespace(device_type="cuda"),
        cache_config=SimpleNamespace(kv_cache_layout="LBHNC"),
        compilation_config=SimpleNamespace(static_forward_context={"a": layer(impl)}),
    )
    cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["a", "elsewhere"])])
    group = Group(0, block_tokens=16, blocks=2, hash_tokens=16)
    return WorkerHalf(config, cache, [group], settings=load_settings()).layout_report()


def test_the_namespace_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [report(i, monkeypatch, SHUFFLING).digest() for i in (NATIVE, SEGMENTED, AITER)]
    assert len(set(digests)) == 3
    assert len({report(i, monkeypatch, CUDA).digest() for i in (FLASH, FLASHINFER)}) == 1


@pytest.mark.skipif(
    (vllm_version().major, vllm_version().minor) != READ_IN, reason="the table is of another vLLM"
)
@pytest.mark.parametrize("writer", sorted(PLAIN))
def test_the_table_names_what_there_is(writer: str) -> None:
    """A name that vLLM does not have would only make equal bytes differ, without a word."""
    module, cls, method = writer.rsplit(".", 2)
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    (found,) = (
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == cls
    )
    assert method in {n.name for n in found.body if isinstance(n, ast.FunctionDef)}


def test_this_machine_is_a_platform() -> None:
    assert this_platform().name in ("cpu", "cuda", "rocm")
