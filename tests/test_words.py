"""One meaning a word, and subjects with names: what of CONTRIBUTING's rules a program can see."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "lmkv_ray").rglob("*.py"))
PRONOUNS = re.compile(r"\b(whoever|whomever|somebody|anybody|nobody|everybody)\b", re.IGNORECASE)
GERUNDS = {
    "framing": "messages in a stream of bytes: the field's word",
    "masking": "what is hidden of secrets: the field's word",
    "finding": "a finding, a noun",
    "ring": "a ring",
    "staging": "to stage is a term of ARCHITECTURE.md",
}
"""Modules whose names end in -ing, and why that is right."""
PLACE = re.compile(
    r"\bin place\b|\btak\w+ (?:its|the) place\b|(?:into|in) (?:the|its) place\b", re.IGNORECASE
)
"""Idioms that mean no node."""


def named(module: Path) -> str:
    return str(module.relative_to(ROOT))


def texts(module: Path) -> Iterator[str]:
    """Docstrings and comments of a module."""
    source = module.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def test_a_name_of_a_class_names_one_class() -> None:
    where = defaultdict(list)
    for module in MODULES:
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(named(module))
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


def test_modules_are_nouns() -> None:
    gerunds = {module.stem for module in MODULES if module.stem.endswith("ing")}
    assert gerunds <= GERUNDS.keys()


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_subjects_have_names(module: Path) -> None:
    assert [text for text in texts(module) if PRONOUNS.search(text)] == []


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_its_is_no_variable(module: Path) -> None:
    tokens = tokenize.generate_tokens(io.StringIO(module.read_text()).readline)
    assert [t.start[0] for t in tokens if t.type == tokenize.NAME and t.string == "its"] == []


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_arguments_are_described_by_more_than_whose_they_are(module: Path) -> None:
    bare = re.compile(r"^\s+\w+: (?:whose|who is asked|of (?:the|a) \w+)\.$", re.MULTILINE)
    assert [found for text in texts(module) for found in bare.findall(text)] == []


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_a_place_is_a_node_of_an_engine(module: Path) -> None:
    """Only the rooms of vLLM's engine know places; elsewhere the word has another meaning."""
    if "lmkv_ray/vllm/" in str(module):
        return
    words = [PLACE.sub("", text) for text in texts(module)]
    assert [text for text in words if re.search(r"\bplaces?\b", text, re.IGNORECASE)] == []
