"""The soak, shortened: right answers in time under random faults. `make soak` also sees leaks."""

from __future__ import annotations

import random

import pytest

from tests.faults.lab import Lab
from tests.faults.recovery import Recovery, fault
from tests.faults.soak import Sample, Soak, leaking


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.quick
@fault("20 s of random faults under traffic", "nothing beyond that", heals_within=60)
def test_soak(lab: Lab, recovery: Recovery) -> None:
    soak = Soak(lab)
    soak.run(20)
    assert soak.requests > 0
    assert soak.faults
    recovery.measure(lab)


def test_a_leak_is_seen_and_noise_is_not() -> None:
    """Beside 1 GB, 150 KB a second for half an hour; and one file descriptor every 5 s."""
    noise = random.Random(0)

    def samples(rss: float, files: float) -> list[Sample]:
        return [
            Sample(at, 1e9 * noise.gauss(1, 0.05) + rss * at, 900 + files * at, 60, 3e8, 1e9, at)
            for at in range(0, 1800, 5)
        ]

    assert not leaking(samples(0, 0))
    leaks = [row.name for row in leaking(samples(1.5e5, 0.2))]
    assert leaks == ["soak: rss, late", "soak: files, late"]
