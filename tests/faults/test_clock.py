"""The wall clock of a host jumps."""

from __future__ import annotations

import time

import pytest

from tests.faults.lab import Lab
from tests.faults.recovery import Recovery, fault

pytestmark = [pytest.mark.ray, pytest.mark.faults]

CLOCK = "/tmp/clock"
"""As in clock/sitecustomize.py, which is not imported here: it would turn our clock."""


@pytest.mark.parametrize("ahead", [3600, -3600])
@fault("clock of a host jumps by an hour, its shard is killed", "local hits go on", heals_within=60)
def test_clock_jumps(lab: Lab, recovery: Recovery, ahead: int) -> None:
    host = lab.hosts[1]
    document = lab.shared(by=1)
    host.write(CLOCK, str(ahead))
    told = host.run(["python", "-c", "import time; print(time.time())"], env=lab.env)
    assert abs(float(told) - time.time() - ahead) < 100
    assert lab.ask(1, document).hits == 8
    lab.ask(0, document)
    host.kill(lab.actor_pid(host, "ShardActor"))  # its next life counts from another time
    recovery.measure(lab)
    assert lab.ask(0, document).hits == 8
    host.write(CLOCK, "0")
