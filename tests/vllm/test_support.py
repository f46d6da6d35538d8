"""What is not supported is refused at start, by name, with a next step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lmkv_ray.arena import this_process
from lmkv_ray.errors import LmkvError, UnsupportedError
from lmkv_ray.host import host_id
from lmkv_ray.vllm.engine import support, versions


class FullAttentionSpec: ...


class MambaSpec: ...


class MLAAttentionSpec: ...


class SlidingWindowSpec: ...


def engine(
    device: str = "cpu",
    calculate_kv_scales: bool = False,
    speculative_config: object = None,
    **parallel: int,
) -> Any:
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
        speculative_config=speculative_config,
    )


def groups(*specs: object) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs])


def test_engines_over_stages_and_nodes_are_supported() -> None:
    support.check_engine(engine(pipeline_parallel_size=2, nnodes=2), groups(FullAttentionSpec()))


@pytest.mark.parametrize(
    "specs",
    [
        [FullAttentionSpec()],
        [MLAAttentionSpec()],
        [SlidingWindowSpec()],
        [SlidingWindowSpec(), FullAttentionSpec()],
    ],
)
def test_models_of_these_kinds_are_supported_on_a_cpu(specs: list[object]) -> None:
    support.check_engine(engine(), groups(*specs))


@pytest.mark.parametrize(
    ("config", "cache", "named"),
    [
        (
            engine(decode_context_parallel_size=2),
            groups(FullAttentionSpec()),
            "decode context parallelism",
        ),
        (engine(device="tpu"), groups(FullAttentionSpec()), "tpu"),
        (engine(calculate_kv_scales=True), groups(FullAttentionSpec()), "calculate_kv_scales"),
        (engine(), groups(FullAttentionSpec(), MambaSpec()), "MambaSpec"),
        (
            engine(speculative_config="eagle"),
            groups(FullAttentionSpec(), FullAttentionSpec()),
            "speculative decoding",
        ),
    ],
)
def test_anything_else_is_refused_by_name(config: Any, cache: Any, named: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"some/model.*{named}.*Next step"):
        support.check_engine(config, cache)


def test_a_load_that_fails_needs_a_vllm_that_can_hear_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _: "0.29.3")
    support.check_engine(engine(), groups(FullAttentionSpec()))
    with pytest.raises(UnsupportedError, match=r"several KV groups on vLLM below 0.30"):
        support.check_engine(engine(), groups(FullAttentionSpec(), SlidingWindowSpec()))


def test_an_engine_out_of_sight_of_all_its_workers_is_refused() -> None:
    from lmkv_ray.vllm.engine.metadata import LayoutReport

    far = LayoutReport(0, "elsewhere", this_process(), layouts=(), packing="")
    near = replace(far, rank=1, host=host_id())
    support.check_workers(engine(), [far, near])
    with pytest.raises(UnsupportedError, match=r"without any of its workers.*Next step"):
        support.check_workers(engine(), [far])


@pytest.mark.parametrize("version", ["0.28.1", "0.34.0", "1.0"])
def test_other_versions_of_vllm_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _: version)
    with pytest.raises(UnsupportedError, match=rf"vLLM {version} is installed.*Next step"):
        from lmkv_ray.vllm import LmkvConnector  # noqa: F401  (as vLLM does it)


@pytest.mark.parametrize("version", ["0.29.0", "0.32.0+cpu", "0.33.1"])
def test_supported_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _: version)
    versions.check_version()


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
