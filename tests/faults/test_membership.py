"""Nodes are lost and come back, and Ray's head with them."""

from __future__ import annotations

import pytest

from tests.faults.lab import Lab
from tests.faults.recovery import Recovery, fault

pytestmark = [pytest.mark.ray, pytest.mark.faults]

GONE_SECONDS = 30.0
"""In which a lost node is forgotten (Ray's own limits are lowered, see lab.NODE_ENV)."""


@fault(
    "raylet killed, its host joins again", "local hits go on; forgotten in 30 s", heals_within=60
)
def test_raylet_killed(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared(by=1)
    here = lab.shared(by=0)
    (raylet,) = lab.hosts[1].pids("raylet/raylet ")
    lab.hosts[1].kill(raylet)
    lab.ask(0, document)
    assert lab.ask(0, here).hits == 8
    lab.eventually(lambda: lab.nodes() == 1, GONE_SECONDS)
    lab.ask(0, lab.new_document())
    lab.rejoin(1)
    recovery.measure(lab)


@fault(
    "host cut off until it is given up, then it joins again",
    "local hits go on; forgotten in 30 s",
    heals_within=60,
)
def test_cut_off_for_long(lab: Lab, recovery: Recovery) -> None:
    document, here = lab.shared(by=1), lab.shared(by=0)
    lab.hosts.cut(lab.hosts[1])
    assert lab.ask(1, document).hits == 8
    lab.ask(0, document)
    assert lab.ask(0, here).hits == 8
    lab.eventually(lambda: lab.nodes() == 1, GONE_SECONDS)
    lab.hosts.heal()
    lab.rejoin(1)
    recovery.measure(lab)
