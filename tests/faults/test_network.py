"""The network between hosts is cut, long, lossy or faulty."""

from __future__ import annotations

import time

import pytest

from tests.faults.lab import Lab
from tests.faults.recovery import Recovery, fault
from tests.hosts import Path

pytestmark = [pytest.mark.ray, pytest.mark.faults]

SHORT_SECONDS = 3.0
"""A cut that Ray does not notice."""


@pytest.mark.quick
@fault("hosts cut off from each other for 3 s", "local hits go on", heals_within=30)
def test_cut(lab: Lab, recovery: Recovery) -> None:
    here, there = lab.shared(by=1), lab.shared(by=0)
    lab.hosts.cut(*lab.hosts)
    began = time.monotonic()
    assert lab.ask(1, here).hits == 8
    assert lab.ask(0, there).hits == 8
    lab.ask(1, there)
    while time.monotonic() < began + SHORT_SECONDS:
        lab.ask(1, lab.new_document())
    lab.hosts.heal()
    recovery.measure(lab)


@pytest.mark.parametrize("source", [0, 1])
@fault("hosts cut off one way for 3 s", "local hits go on", heals_within=30)
def test_cut_one_way(lab: Lab, recovery: Recovery, source: int) -> None:
    here, there = lab.shared(by=1), lab.shared(by=0)
    lab.hosts.cut_one_way(lab.hosts[source], lab.hosts[1 - source])
    began = time.monotonic()
    assert lab.ask(1, here).hits == 8
    lab.ask(1, there)
    while time.monotonic() < began + SHORT_SECONDS:
        lab.ask(0, lab.new_document())
    lab.hosts.heal()
    recovery.measure(lab)


@fault(
    "hosts cut off from each other during a fetch", "a miss within the deadline", heals_within=30
)
def test_cut_during_a_fetch(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared(64)
    lab.fetch_in_the_middle(document, 64)
    lab.hosts.cut(*lab.hosts)
    assert lab.check(lab.engines[1].result()).hits < 64
    lab.hosts.heal()
    recovery.measure(lab)


@fault("200 ms round trips, 2 % of packets lost", "the cache still works", heals_within=30)
def test_bad_line(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared()
    lab.hosts.degrade(Path(delay=0.1, loss=0.02))
    lab.ask(1, document)
    lab.eventually(lambda: lab.ask(1, lab.shared(2), 2).hits == 2, 60)
    lab.hosts.heal()
    recovery.measure(lab)


@pytest.mark.quick
@fault("bytes changed on the wire", "no damaged chunk is used", heals_within=30)
def test_bytes_changed_on_the_wire(lab: Lab, recovery: Recovery) -> None:
    document = lab.shared(16)
    before = lab.hosts.switch.damaged
    lab.hosts.degrade(Path(damage=0.3))
    answer = lab.ask(1, document, 16)
    lab.hosts.heal()
    assert lab.hosts.switch.damaged > before
    assert answer.hits < 16
    recovery.measure(lab)
