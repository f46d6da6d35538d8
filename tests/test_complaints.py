from __future__ import annotations

import logging

import pytest

from lmkv_ray.complaints import Complaints, quote


def test_few_lines_are_logged_and_the_next_one_counts_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    complaints = Complaints(logging.getLogger("lmkv_ray"), lambda: now[0])
    for _ in range(1000):
        complaints.say("trouble.")
    now[0] = 11.0
    complaints.say("trouble.", error=ValueError("deep"))
    assert [record.message for record in caplog.records] == [
        "lmkv_ray: trouble.",
        "lmkv_ray: trouble. (999 more like this since the last such line.)",
    ]
    assert "ValueError: deep" in caplog.text


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("ttl", "'ttl'"),
        ("a\nWARNING forged\x1b[2J", r"'a\nWARNING forged\x1b[2J'"),
        ("\ud800é", r"'\ud800\xe9'"),
        ("x" * 5_000_000, f"'{'x' * 64}'..."),
        (7, "a value of type int"),
    ],
)
def test_what_a_stranger_wrote_is_quoted_short_and_in_one_line(text: object, quoted: str) -> None:
    assert quote(text) == quoted
