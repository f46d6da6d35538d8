"""What the documents name is there, and their snippets are right.

Commands and their options, make's targets, modules, settings, files, tests, counters. What a
command does is not tried here: most of them need a cluster.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from lmkv_ray.cli import app
from lmkv_ray.config import CONFIG_FILE_VARIABLE, Settings
from lmkv_ray.keys import Namespace
from lmkv_ray.metrics.engine import ENGINE_COUNTERS
from lmkv_ray.vllm.scheduler.wishes import WishReader
from serve_apps.llm import AppArgs

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lmkv_ray"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "cluster_configs").rglob("*.md")),
    *sorted((ROOT / "cluster_configs").rglob("*.yaml")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
    ROOT / "serve_apps" / "llm.yaml",
]
PROGRAM = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "serve_apps").glob("*.py")])
OTHERS = ("build/", "v1/", "chunks/", "clears/", "rayproject/", "FAST25-release/")
"""Of paths that are not in the checkout: what is made, vLLM's, a store's, an image's, a trace's."""
README = (ROOT / "README.md").read_text()

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def snippets(text: str) -> Iterator[str]:
    """Indented blocks, without their indentation."""
    for block in re.findall(r"(?:^(?: {4}.*)?\n)+", text, flags=re.M):
        if block.strip():
            yield textwrap.dedent(block).strip("\n")


def test_commands_of_lmkv() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    quoted = re.compile(r"(?:[`']|^(?: {4}|# *))(?:\.venv/bin/)?lmkv (\w+)([^`'\n]*)", flags=re.M)
    for path in DOCUMENTS + PROGRAM:  # errors name commands too
        for name, rest in quoted.findall(path.read_text()):
            assert name in commands, f"{path}: lmkv {name}"
            options = {option for item in commands[name].params for option in item.opts}
            assert set(re.findall(r"--[\w-]+", rest)) <= options, f"{path}: lmkv {name}{rest}"


@each_document
def test_targets_of_make(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = document.read_text()
    for target, rest in re.findall(r"(?:`|^ {4})make ([\w-]+)([^`#\n]*)", text, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"make {target}"
        for variable in re.findall(r"([A-Z]+)=", rest):
            assert f"$({variable})" in makefile or f"{variable} ?=" in makefile, variable


@each_document
def test_modules_that_are_run(document: Path) -> None:
    for name in re.findall(r"python -m ([\w.]+)", document.read_text()):
        assert importlib.util.find_spec(name), name


@each_document
def test_settings(document: Path) -> None:
    known = {f"LMKV_{name.upper()}" for name in Settings.model_fields} | {CONFIG_FILE_VARIABLE}
    assert set(re.findall(r"\bLMKV_[A-Z_]*[A-Z]\b", document.read_text())) <= known


@each_document
def test_counters_and_what_they_are_called(document: Path) -> None:
    named = set(re.findall(r"vllm:lmkv_(\w+?)(?:_total)?\b", document.read_text()))
    assert named <= {*ENGINE_COUNTERS, "missed_tokens"}


@each_document
def test_files(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text) if document.suffix == ".md" else []
    assert [link for link in links if not (document.parent / link).exists()] == []
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)+)/?(?:::\w+)?`", text)
    places = (ROOT, PACKAGE, document.parent)
    assert [
        path
        for path in named
        if not path.startswith(OTHERS) and not any((place / path).exists() for place in places)
    ] == []


@each_document
def test_tests(document: Path) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", document.read_text()):
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


@each_document
def test_python(document: Path) -> None:
    for snippet in snippets(document.read_text()):
        if not re.match(r"(import|from) \w+", snippet):
            continue
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []
            elif isinstance(node, ast.Import):
                for imported in node.names:
                    importlib.import_module(imported.name)


def test_every_field_of_a_namespace_is_explained() -> None:
    rows = re.findall(r"^\| ([\w, ]+) \|", (ROOT / "docs" / "identity.md").read_text(), flags=re.M)
    named = {name for row in rows[1:] for name in row.split(", ")}
    assert named == set(Namespace.__struct_fields__)


def test_methods_of_a_cache() -> None:
    from lmkv_ray import Cache

    [snippet] = [item for item in snippets(README) if item.startswith("import lmkv_ray")]
    called = set(re.findall(r"cache\.(\w+)\(", snippet))
    called |= set(re.findall(r"[a-z]+", str(re.findall(r"also ([^;]*)", snippet)))) & set(
        dir(Cache)
    )
    assert called >= {"status", "clear", "pin", "unpin", "where", "evict", "move", "drain", "stop"}
    assert called <= set(dir(Cache))


def test_how_vllm_is_told() -> None:
    told = re.findall(r"--kv-transfer-config '(\{.*?\})'", README, flags=re.S)
    assert len(told) == 2
    for text in told:
        config = json.loads(text)
        module = importlib.import_module(config["kv_connector_module_path"])
        assert hasattr(module, config["kv_connector"])
    [settings] = re.findall(r'`"kv_connector_extra_config": (\{.*?\})`', README)
    Settings(**json.loads(settings))


def test_hints_of_a_request() -> None:
    [hints] = re.findall(r'"kv_transfer_params": (\{.*\}\})', README)
    refused: list[None] = []
    wishes = WishReader(lambda: refused.append(None)).read(json.loads(hints))
    assert wishes.keys
    assert not refused


def test_the_app_of_ray_serve() -> None:
    [text] = [item for item in snippets(README) if item.startswith("applications:")]
    [application] = yaml.safe_load(text)["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    AppArgs.model_validate(application["args"])
    [given] = re.findall(r"build_app\((\{.*?\})\)", README)
    AppArgs.model_validate(json.loads(given))
