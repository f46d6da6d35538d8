"""The hosts that faults are tried on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.lab import Lab
from tests.faults.record import FAILED
from tests.hosts import why_not
from tests.leaks import MARK


class Shared:
    """One lab for all tests, and another one after a test that failed."""

    def __init__(self) -> None:
        self._lab: Lab | None = None

    def get(self) -> Lab:
        """Two hosts with Ray, a cache and two engines."""
        if self._lab is None:
            with pytest.MonkeyPatch.context() as patch:
                # It outlives the module that it is made for: not a leak of that module.
                patch.delenv(MARK.partition("=")[0], raising=False)
                self._lab = Lab(2)
        return self._lab

    def close(self) -> None:
        """End it."""
        if self._lab is not None:
            self._lab.close()
            self._lab = None


@pytest.fixture(scope="package")
def shared() -> Iterator[Shared]:
    """See ``Shared``."""
    if reason := why_not():
        pytest.skip(reason)
    made = Shared()
    yield made
    made.close()


@pytest.fixture
def lab(shared: Shared, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Hosts; after each test the network is good and nothing is frozen."""
    made = shared.get()
    yield made
    if request.node.stash.get(FAILED, False):
        shared.close()
    else:
        made.heal()
