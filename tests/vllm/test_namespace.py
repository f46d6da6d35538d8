"""Namespaces tell apart whatever makes up chunks of other bytes."""

from __future__ import annotations

import logging

import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.messages import Owner
from lmkv_ray.vllm.metadata import LayoutReport
from lmkv_ray.vllm.namespace import derive_namespace, hashing
from tests.vllm.two_places import GROUP, config


def digest(*layers: int, ranks: list[int] | None = None) -> bytes:
    """Of an engine whose stages have so many layers."""
    reports = [
        LayoutReport(
            rank,
            "here",
            Owner(pid=1, start=1),
            (ChunkLayout(tuple(Run(i * 512, 64, 64) for i in range(n)), 1, 8),),
            "cpu",
        )
        for rank, n in enumerate(layers)
    ]
    return derive_namespace(config(0), load_settings(), [GROUP], reports, ranks).digest()


def test_engines_that_cut_a_model_otherwise_share_nothing() -> None:
    cuts = [(5,), (1, 3, 1), (1, 1, 3), (3, 1, 1)]
    assert len({digest(*cut) for cut in cuts}) == len(cuts)


def test_nodes_of_an_engine_share_nothing_but_with_the_same_ranks_of_others() -> None:
    first, second, all_ranks = digest(2, 2, ranks=[0]), digest(2, 2, ranks=[1]), digest(2, 2)
    assert len({first, second, all_ranks}) == 3
    assert digest(2, 2, ranks=[1]) == second


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
