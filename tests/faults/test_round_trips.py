"""How often a fetch goes to and fro before its first chunk can be used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.lab import Lab
from tests.hosts import Path, why_not

pytestmark = [pytest.mark.ray, pytest.mark.faults]

ROUND_TRIP = 0.4
"""Seconds: long beside what computing takes, also on a busy machine."""


WARM_UP, CHUNKS = 3, 16
"""Documents fetched before, until TCP has learnt how much may be under way at a time."""


@pytest.fixture
def fresh() -> Iterator[Lab]:
    """Hosts whose connections have not learnt from lost packets to send but a few at a time."""
    if reason := why_not():
        pytest.skip(reason)
    lab = Lab(2, stage_seconds=60.0)
    yield lab
    lab.close()


def test_the_first_chunk_is_here_after_three_round_trips(fresh: Lab) -> None:
    """One asks the directory, one the peer where its chunks are, one reads them.

    Once in a while a reader looks into the peer's tables by itself, which takes as many. A
    connection that was idle may send but a few packets at first, which would be a fourth one: that
    is TCP's, and switched off here.
    """
    lab = fresh
    lab.wait_healthy(60)
    learning = [lab.shared(CHUNKS) for _ in range(WARM_UP)]
    documents = [lab.shared(1) for _ in range(3)]
    for host in lab.hosts:
        host.run("echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle")
    lab.hosts.degrade(Path(delay=ROUND_TRIP / 2))
    for number in learning:
        assert lab.engines[1].call("gather", [number], CHUNKS)[2] == CHUNKS
    taken = []
    for number in documents:
        first, _, present = lab.engines[1].call("gather", [number], 1)
        assert present == 1
        taken.append(first / ROUND_TRIP)
    assert min(taken) < 3.9, f"round trips: {taken}"
