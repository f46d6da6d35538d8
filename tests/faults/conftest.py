"""The fault matrix: its hosts, and the table of its results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.lab import Lab
from tests.faults.recovery import Recovery, Row, write_table
from tests.hosts import why_not

TABLE_VARIABLE = "FAULTS_TABLE"
"""Names the file that the table is written to."""

_ROWS: dict[str, Row] = {}


@pytest.fixture(scope="session")
def one_lab() -> Iterator[Lab]:
    """Two hosts with Ray, a cache and two engines."""
    if reason := why_not():
        pytest.skip(reason)
    made = Lab(2)
    yield made
    made.close()


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    """The same for all tests, healthy before and with a good network after each."""
    yield one_lab
    one_lab.hosts.heal()


@pytest.fixture
def recovery(request: pytest.FixtureRequest) -> Recovery:
    """Of a test that ``fault`` declares."""
    marker = request.node.get_closest_marker("fault")
    made = Recovery(marker.kwargs["heals_within"])
    request.node.stash[_RECOVERY] = made
    return made


_RECOVERY = pytest.StashKey[Recovery]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    """Note what became of each fault."""
    report: pytest.TestReport = yield
    marker = item.get_closest_marker("fault")
    if marker is not None and (call.when == "call" or report.outcome != "passed"):
        made = item.stash.get(_RECOVERY, None)
        verdict = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            verdict = f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
        _ROWS[item.nodeid] = Row(
            *marker.args, marker.kwargs["heals_within"], made and made.seconds, verdict
        )
    return report


def pytest_sessionfinish() -> None:
    """Write the table, if one is wanted."""
    if (path := os.environ.get(TABLE_VARIABLE)) and _ROWS:
        write_table(Path(path), list(_ROWS.values()))
