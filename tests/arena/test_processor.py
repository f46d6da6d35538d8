"""Processors that reorder loads and stores are refused by shard and engine."""

from __future__ import annotations

import platform

import pytest

from lmkv_ray.arena import ArenaReader, ArenaWriter
from lmkv_ray.errors import UnsupportedError
from tests.arena.conftest import CAPACITY


def test_other_processors_are_refused(writer: ArenaWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UnsupportedError, match=r"aarch64.*Next step: use x86-64"):
        ArenaWriter.create("testother", CAPACITY)
    with pytest.raises(UnsupportedError, match="aarch64"):
        ArenaReader.attach(writer.path)
