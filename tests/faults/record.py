"""Notes what becomes of each test that ``fault`` declares, wherever it is (see tests/conftest)."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.faults.recovery import Recovery, Row, write_table

TABLE_VARIABLE = "FAULTS_TABLE"
"""Names the file that the table is written to."""

_ROWS: dict[str, Row] = {}
_RECOVERY = pytest.StashKey[Recovery]()
FAILED = pytest.StashKey[bool]()
"""Of a test: whether it has failed."""


@pytest.fixture
def recovery(request: pytest.FixtureRequest) -> Recovery:
    """Of a test that ``fault`` declares."""
    marker = request.node.get_closest_marker("fault")
    made = Recovery(marker.kwargs["heals_within"])
    request.node.stash[_RECOVERY] = made
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what became of each fault."""
    report = yield
    item.stash[FAILED] = report.failed
    marker = item.get_closest_marker("fault")
    if marker is not None and (call.when == "call" or report.outcome != "passed"):
        made = item.stash.get(_RECOVERY, None)
        verdict: str = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            verdict = f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
        name, promise = marker.args
        seconds = None if made is None else made.seconds
        _ROWS[item.nodeid] = Row(name, promise, marker.kwargs["heals_within"], seconds, verdict)
    return report


def pytest_sessionfinish() -> None:
    """Write the table, if one is wanted."""
    if (path := os.environ.get(TABLE_VARIABLE)) and _ROWS:
        write_table(Path(path), list(_ROWS.values()))
