"""What engines must have in common to share chunks."""

from __future__ import annotations

import logging

import pytest

from lmkv_ray.vllm.namespace import hashing


@pytest.mark.parametrize(
    ("algorithm", "seed", "warned"),
    [
        ("sha256", None, False),
        ("sha256_cbor", None, False),
        ("xxhash", None, True),
        ("xxhash_cbor", None, True),
        ("xxhash", "7", False),
    ],
)
def test_hashes_that_no_other_engine_has_are_warned_of(
    algorithm: str,
    seed: str | None,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    with caplog.at_level(logging.WARNING):
        assert hashing(algorithm) == f"{algorithm} {seed or ''}"
    assert ("PYTHONHASHSEED" in caplog.text) == warned
