"""How a fault is declared, how long the cache takes to be healthy again, and the table of both."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest


def fault(name: str, promise: str, *, heals_within: float) -> pytest.MarkDecorator:
    """Declare a test of the fault matrix.

    Args:
        name: what happens.
        promise: what holds meanwhile, beyond right answers within the deadline.
        heals_within: seconds in which the cache is healthy again after the fault is over.
    """
    return pytest.mark.fault(name, promise, heals_within=heals_within)


class Patient(Protocol):
    """What a fault is tried on."""

    def wait_healthy(self, within: float) -> float:
        """Until the cache works in every respect; returns seconds.

        Raises:
            AssertionError: it did not in time.
        """
        ...

    def left_behind(self) -> list[str]:
        """What should not be there."""
        ...


LEAVE_SECONDS = 15.0
"""What ends may take so long to end: Ray's processes, mostly."""


@dataclass
class Recovery:
    """Of one test, declared by ``fault``."""

    heals_within: float
    seconds: float | None = None

    def measure(self, patient: Patient) -> None:
        """The fault is over: wait until all is well, and nothing is left behind."""
        self.seconds = patient.wait_healthy(self.heals_within)
        deadline = time.monotonic() + LEAVE_SECONDS
        while (left := patient.left_behind()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, f"left behind: {left}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    promise: str
    heals_within: float
    seconds: float | None
    verdict: str


HEAD = """# Faults, and what happens then

Made by `make test-faults`, which tries each of these on real Ray clusters: on hosts of their own on
one machine (`tests/hosts`), or on raylets with real vLLM engines. Do not edit.

Always, and not repeated below: every request is answered, with the right tokens (where there is no
model: the right bytes), and later than without the fault by `stage_seconds` at most; nothing is
left behind. *Healthy* means: what any engine reads is a hit on every other node.
"""


def write_table(path: Path, rows: list[Row]) -> None:
    """Write the results as a page."""
    lines = [
        "| what happens | what holds meanwhile | healthy again within | seen | verdict |",
        "|---|---|---:|---:|---|",
    ]
    for row in rows:
        seen = "" if row.seconds is None else f"{row.seconds:.1f} s"
        lines.append(
            f"| {row.name} | {row.promise} | {row.heals_within:.0f} s | {seen} | {row.verdict} |"
        )
    passed = sum(row.verdict == "passed" for row in rows)
    when = f"{time.strftime('%Y-%m-%d', time.gmtime())}, Linux {platform.release()}"
    lines += ["", f"{passed} of {len(rows)} passed. {when}; times are of a busy 2-core machine."]
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEAD + "\n" + "\n".join(lines) + "\n")
