"""docs/security.md promises nothing without a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "security.md").read_text()
PROMISES = [part.split("\n\n")[0] for part in re.split(r"^- ", TEXT, flags=re.M)[1:]]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("promise", PROMISES, ids=lambda text: text[:40])
def test_each_promise_has_a_test(promise: str) -> None:
    named = NAMED.findall(promise)
    assert named, "it names none"
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        functions = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions, f"{path} has no {name}"


def test_there_are_promises() -> None:
    assert len(PROMISES) >= 20
    assert len(NAMED.findall(TEXT)) == sum(len(NAMED.findall(promise)) for promise in PROMISES)
