"""How long a lane looks away: its end is seen soon, and nobody is held up for what takes long."""

from __future__ import annotations

import pytest

from lmkv_ray.transfer import lane
from lmkv_ray.transfer.device import DeviceError
from lmkv_ray.transfer.lane import LOOK_SECONDS
from tests.transfer.cases import random_bytes
from tests.transfer.rig import Rig
from tests.transfer.shuffled_device import ShuffledDevice
from tests.transfer.test_lanes import PACKED

SHORTEST, LONGEST = LOOK_SECONDS


@pytest.fixture
def rig() -> Rig:
    """A load that is queued behind a step of the model."""
    rig = Rig(PACKED, ShuffledDevice(1))
    rig.model_writes(random_bytes(1, PACKED.cache_bytes))
    rig.submit(rig.load())
    rig.loads.pump()
    return rig


def finish_the_step(rig: Rig) -> None:
    while rig.device.compute.work:
        assert rig.device.step()


def test_nothing_in_flight_is_not_looked_at(rig: Rig) -> None:
    assert rig.saves.pause() == LONGEST


def test_a_job_that_waits_for_the_model_is_looked_at_rarely(rig: Rig) -> None:
    assert rig.loads.pause() == LONGEST
    finish_the_step(rig)
    assert rig.loads.pause() < LONGEST


def test_less_in_flight_is_looked_at_sooner(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_the_step(rig)
    pauses = []
    while rig.loads._flight:
        pauses.append(rig.loads.pause())
        if not rig.device.step():
            break
        rig.loads.pump()
    assert pauses[0] > pauses[-1] == SHORTEST
    assert pauses == sorted(pauses, reverse=True)
    rig.submit(rig.load())
    rig.loads.pump()
    monkeypatch.setattr(lane, "STEP_SECONDS", 1.0)
    assert rig.loads.pause() == LONGEST


def test_a_dead_device_is_looked_at_rarely_and_costs_no_exception(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(event: object) -> bool:
        raise DeviceError("dead")

    monkeypatch.setattr(rig.device, "done", dead)
    assert rig.loads.pause() == LONGEST
    assert rig.health.broken
