"""The hosts that faults are tried on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.lab import Lab
from tests.hosts import why_not


@pytest.fixture(scope="package")
def one_lab() -> Iterator[Lab]:
    """Two hosts with Ray, a cache and two engines."""
    if reason := why_not():
        pytest.skip(reason)
    made = Lab(2)
    yield made
    made.close()


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    """The same for all tests; after each the network is good and nothing is frozen."""
    yield one_lab
    one_lab.heal()
