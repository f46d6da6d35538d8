"""Engines of one model name that share nothing say why."""

from __future__ import annotations

from lmkv_ray.keys import Namespace
from lmkv_ray.kin import MOST_KIN, differing, explain, kinds
from lmkv_ray.messages import Kin
from lmkv_ray.tenants import space_of

ONE = Namespace(
    model="m", weights="w", dtype="bf16", cache_dtype="auto", layout="l", block_tokens=16,
    chunk_tokens=256, hash_algorithm="sha256 ", parallel="tp1 pp1", engine="vllm 0.32",
    salt="secret",
)  # fmt: skip


def kin(model: str = "llama", **changes: str) -> Kin:
    namespace = Namespace(**{name: getattr(ONE, name) for name in ONE.__struct_fields__} | changes)
    return Kin(model=model, space=space_of(namespace.digest()), fields=namespace.fields())


def test_the_fields_that_differ_are_named() -> None:
    others = [kin(weights="x"), kin(weights="w", cache_dtype="fp8"), kin()]
    assert differing(kin(), others) == ["cache_dtype", "weights"]


def test_engines_that_share_have_no_differences() -> None:
    assert differing(kin(), [kin(), kin()]) == []


def test_other_models_and_engines_that_are_not_known_yet_are_no_kin() -> None:
    unknown = Kin(model="llama", space=0, fields={})
    assert differing(kin(), [kin("qwen", weights="x"), unknown]) == []
    assert differing(unknown, [kin()]) == []


def test_nodes_of_one_engine_share_the_reason_that_they_are_of_one_engine() -> None:
    assert differing(kin(parallel="tp4 pp1 ranks 0 1"), [kin(parallel="tp4 pp1 ranks 2 3")]) == []


def test_what_is_told_is_bounded() -> None:
    assert len(kinds(kin(weights=str(i)) for i in range(100))) == MOST_KIN


def test_a_salt_is_not_told() -> None:
    assert "secret" not in str(kin().fields)
    assert differing(kin(), [kin(salt="other")]) == ["salt"]


def test_the_status_names_model_nodes_fields_and_values() -> None:
    [line] = explain({"node-a": [kin()], "node-b": [kin(weights="other weights"), kin("qwen")]})
    for part in ("llama", "node-a", "node-b", "weights: other weights / w"):
        assert part in line
    assert explain({"node-a": [kin()], "node-b": [kin()]}) == []
