from __future__ import annotations

import logging
import time

import pytest

from lmkv_ray.hints import NO_HINTS
from lmkv_ray.vllm.wishes import NO_WISHES, wishes_of


@pytest.mark.parametrize("params", [None, {}, [], "x", {"do_remote_prefill": True}])
def test_most_requests_wish_nothing(params: object) -> None:
    assert wishes_of(params) is NO_WISHES
    assert NO_WISHES.hints() is NO_HINTS


def test_wishes_become_hints() -> None:
    wishes = wishes_of({"lmkv": {"pin": True, "ttl": 60, "priority": 2, "session": "s"}})
    hints = wishes.hints()
    assert hints.pinned
    assert hints.priority == 2
    assert hints.session == "s"
    assert hints.deadline is not None
    assert hints.deadline == pytest.approx(time.monotonic() + 60, abs=5)


@pytest.mark.parametrize("wrong", [None, 5, {"pin": "maybe"}, {"tll": 3}, {"ttl": [1]}])
def test_nonsense_is_ignored_and_said_once(wrong: object, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert wishes_of({"lmkv": wrong}) is NO_WISHES
    assert len(caplog.records) <= 1
