"""The soak, shortened: right answers in time under random faults. `make soak` also sees leaks."""

from __future__ import annotations

import pytest

from tests.faults.lab import Lab
from tests.faults.recovery import Recovery, fault
from tests.faults.soak import Soak

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@pytest.mark.quick
@fault("20 s of random faults under traffic", "nothing beyond that", heals_within=60)
def test_soak(lab: Lab, recovery: Recovery) -> None:
    soak = Soak(lab)
    soak.run(20)
    assert soak.requests > 0
    assert soak.faults
    recovery.measure(lab)
