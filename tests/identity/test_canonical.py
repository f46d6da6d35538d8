"""Equal values, and only those, have equal texts: in every process, whatever they are made of."""

from __future__ import annotations

import enum
import functools
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from lmkv_ray.errors import UnsupportedError
from lmkv_ray.identity import canonical


class Kind(enum.Enum):
    A = 1
    B = 2


class OfAModel:
    """As code that comes with a model defines it."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


DIFFERENT: list[Any] = [
    None,
    True,
    1,
    1.5,
    "1",
    b"1",
    Kind.A,
    Kind.B,
    [1, 2],
    [2, 1],
    {1, 2},
    {"a": 1},
    {"a": 1, 1: "b", None: 2},
    {"a": {"b"}},
    torch.bfloat16,
    torch.float16,
    np.float32(1.5),
    np.arange(3),
    np.arange(4),
    OfAModel(a=1),
    OfAModel(a=2),
    OfAModel(a={1, "x"}),
    functools.partial(int, base=2),
    functools.partial(int, base=3),
    re.compile("a"),
    re.compile("b"),
    len,
    dict,
]


def test_other_values_have_other_texts() -> None:
    texts = [canonical(value, "field") for value in DIFFERENT]
    assert len(set(texts)) == len(texts)
    assert not any(re.search(r"0x[0-9a-f]{6,}", text) for text in texts)


def test_the_order_in_which_something_was_put_together_does_not_matter() -> None:
    first, second = {"a": 1, 2: {3, "b"}}, {2: {"b", 3}, "a": 1}
    assert canonical(first, "field") == canonical(second, "field")
    assert canonical(OfAModel(a=1, b=2), "f") == canonical(OfAModel(b=2, a=1), "f")


def test_texts_are_the_same_in_every_process() -> None:
    code = (
        "from tests.identity.test_canonical import DIFFERENT, canonical;"
        "print([canonical(v, 'field') for v in DIFFERENT])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"rope": {"scale": lambda x: x}}, "hf_config.rope.scale"),
        ([1, (i for i in [1])], "hf_config[1]"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(value: Any, named: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{re.escape(named)} .*Next step"):
        canonical(value, "hf_config")


def test_what_refers_to_itself_is_refused() -> None:
    loop = OfAModel()
    loop.own = {"again": loop}  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="refers to itself"):
        canonical(loop, "hf_config")
