"""Shared by all tests: the demo's model, the leak check, and the table of faults."""

import logging
from pathlib import Path

import pytest
from hypothesis import settings

from serve_apps import model
from tests.faults.record import (  # noqa: F401  (a fixture and hooks: the fault matrix)
    pytest_runtest_makereport,
    pytest_sessionfinish,
    recovery,
)
from tests.leaks import no_leaks, run_mark  # noqa: F401  (fixtures: the leak check)

# How long an example takes says more of the machine than of the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def own_log() -> None:
    """What an engine or an actor of an earlier test has arranged for our log says nothing here."""
    ours = logging.getLogger("lmkv_ray")
    ours.setLevel(logging.NOTSET)
    ours.handlers.clear()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16 as a Hugging Face directory; made once per checkout."""
    return model.smollm2()


@pytest.fixture(scope="session")
def smollm2_float32() -> Path:
    """The same in float32, where cold runs and cached runs agree."""
    return model.smollm2("float32")
