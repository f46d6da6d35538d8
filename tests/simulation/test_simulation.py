"""A hundred seeds hold, a seed replays exactly, and the simulation finds bugs that we know."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.simulation.mutations import MUTATIONS, Mutation, mutated

QUICK = ("clear_spares_what_is_being_filled", "window_not_released", "damage_not_noticed")
"""Mutations that the first few seeds find."""


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_hundred_seeds_hold() -> None:
    result = simulate("--seeds", "0:100")
    assert result.returncode == 0, result.stdout


def test_a_seed_replays_exactly() -> None:
    one, other = (simulate("--seeds", "4", "--story").stdout.splitlines() for _ in range(2))
    assert len(one) > 20
    assert one[:-1] == other[:-1]  # the last line has seconds


@pytest.mark.parametrize("name", QUICK)
def test_a_known_bug_is_found(name: str) -> None:
    result = simulate("--mutation", name, "--seeds", "0:50")
    assert result.returncode == 1, result.stdout
    assert "seed" in result.stdout


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_what_it_says(mutation: Mutation) -> None:
    spec = find_spec(mutation.module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    assert mutated(source, mutation) != source
