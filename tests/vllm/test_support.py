"""What is not supported is refused at start, by name, with a next step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmkv_ray.errors import LmkvError, UnsupportedError
from lmkv_ray.vllm import support


class FullAttentionSpec: ...


class MambaSpec: ...


class MLAAttentionSpec: ...


def engine(device: str = "cpu", calculate_kv_scales: bool = False, **parallel: int) -> Any:
    sizes = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(model="some/model"),
        parallel_config=SimpleNamespace(**(sizes | parallel)),
        cache_config=SimpleNamespace(calculate_kv_scales=calculate_kv_scales),
        device_config=SimpleNamespace(device_type=device),
    )


def groups(*specs: object) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs])


def test_a_plain_model_on_a_cpu_is_supported() -> None:
    support.check_engine(engine(), groups(FullAttentionSpec()))


@pytest.mark.parametrize(
    ("config", "cache", "named"),
    [
        (engine(tensor_parallel_size=2), groups(FullAttentionSpec()), "tensor parallelism"),
        (engine(pipeline_parallel_size=2), groups(FullAttentionSpec()), "pipeline parallelism"),
        (engine(device="cuda"), groups(FullAttentionSpec()), "cuda"),
        (engine(calculate_kv_scales=True), groups(FullAttentionSpec()), "calculate_kv_scales"),
        (engine(), groups(FullAttentionSpec(), FullAttentionSpec()), "2 KV cache groups"),
        (engine(), groups(MambaSpec()), "MambaSpec"),
        (engine(), groups(MLAAttentionSpec()), "MLAAttentionSpec"),
    ],
)
def test_anything_else_is_refused_by_name(config: Any, cache: Any, named: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"some/model.*{named}.*Next step"):
        support.check_engine(config, cache)


@pytest.mark.parametrize("version", ["0.28.1", "0.34.0", "1.0"])
def test_other_versions_of_vllm_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "version", lambda _: version)
    with pytest.raises(UnsupportedError, match=f"vLLM {version} is installed"):
        support.check_version()


@pytest.mark.parametrize("version", ["0.29.0", "0.32.0+cpu", "0.33.1"])
def test_supported_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "version", lambda _: version)
    support.check_version()


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("connector", "options", "named"),
    [
        ({"capacity": "lots"}, {}, "capacity"),
        ({"no_such_setting": 1}, {}, "no_such_setting"),
    ],
)
def test_a_wrong_setting_stops_the_engine_at_start(
    connector: dict[str, Any], options: dict[str, Any], named: str, bfloat16_model: str
) -> None:
    from tests.vllm.engine import EngineProcess

    failing = EngineProcess(bfloat16_model, connector=connector, **options)
    try:
        with pytest.raises((LmkvError, EOFError)) as caught:
            failing.call("generate", [[1, 2, 3]])
        assert named in str(caught.value)
        assert "lmkv config" in str(caught.value)
    finally:
        failing.close()
