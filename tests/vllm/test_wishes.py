from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.hints import NO_HINTS
from lmkv_ray.vllm.scheduler.wishes import NO_WISHES, AnywhereWish, Wishes, WishReader

DEEP: Any = {"pin": True}
for _ in range(100_000):
    DEEP = {"pin": DEEP}


class Reader:
    def __init__(self) -> None:
        self.refused = 0
        self._reader = WishReader(self.count)

    def count(self) -> None:
        self.refused += 1

    def read(self, wishes: object) -> Wishes:
        return self._reader.read({"lmkv": wishes})


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.mark.parametrize("params", [None, {}, [], "x", {"do_remote_prefill": True}])
def test_most_requests_wish_nothing(params: object) -> None:
    assert WishReader(lambda: pytest.fail("counted")).read(params) is NO_WISHES
    assert NO_WISHES.hints() is NO_HINTS


def test_wishes_become_hints(reader: Reader) -> None:
    wishes = reader.read({"pin": True, "ttl": 60, "priority": 2, "session": "s", "keys": True})
    hints = wishes.hints()
    assert hints.pinned
    assert wishes.keys
    assert hints.priority == 2
    assert hints.session == "s"
    assert hints.deadline is not None
    assert hints.deadline == pytest.approx(time.monotonic() + 60, abs=5)
    assert not reader.refused


@pytest.mark.parametrize(
    "good",
    [
        {"ttl": 0},
        {"ttl": None},
        {"ttl": 315_576_000.0},
        {"priority": 16},
        {"priority": -16},
        {"session": "x" * 128},
        {"category": "é" * 64},
        {"session": "ein Gespräch"},
    ],
)
def test_at_the_limit_all_is_well(reader: Reader, good: dict[str, object]) -> None:
    assert reader.read(good) == Wishes(**good)  # type: ignore[arg-type]
    assert reader.read(good).hints().sound(time.monotonic())
    assert not reader.refused


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        5,
        [["pin", True]],
        DEEP,
        {"tll": 3},
        {3: True},
        {f"name{i}": i for i in range(1_000_000)},
        {"pin": "maybe"},
        {"pin": 1},
        {"keys": []},
        {"ttl": [1]},
        {"ttl": True},
        {"ttl": -1},
        {"ttl": float("nan")},
        {"ttl": float("inf")},
        {"ttl": 10**400},
        {"ttl": 315_576_001},
        {"priority": 2**70},
        {"priority": 17},
        {"priority": 1.0},
        {"priority": False},
        {"session": "\ud800"},
        {"category": "\ud800"},
        {"session": "x" * 129},
        {"session": "é" * 65},
        {"session": "x" * 2_000_000},
        {"session": "two\nlines"},
        {"session": None},
        {"session": b"bytes"},
        {"ttl": 5, "priority": 2**70},
    ],
    ids=lambda wrong: repr(wrong)[:40] if wrong is not DEEP else "deep",
)
def test_nonsense_is_ignored_and_counted(
    reader: Reader, wrong: object, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.process_time()
    for n in range(1, 4):
        assert reader.read(wrong) is NO_WISHES
        assert reader.refused == n
    assert time.process_time() - began < 0.05
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert len(record.message) < 400


def test_a_thousand_strange_names_are_one_line_that_cannot_be_forged(
    reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(1000):
        reader.read({f"x\nERROR {i}\x1b[31m" + "y" * 10_000: 1})
    assert reader.refused == 1000
    [record] = caplog.records
    assert record.message.isprintable()
    assert record.message.isascii()
    assert len(record.message) < 400


json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(wishes=st.dictionaries(st.sampled_from(Wishes.__struct_fields__), json) | json)
def test_whatever_is_read_is_sound_or_refused(wishes: object) -> None:
    reader = Reader()
    wish = reader.read(wishes)
    assert wish.hints().sound(time.monotonic())
    assert wish == NO_WISHES or not reader.refused


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (True, AnywhereWish()),
        (False, AnywhereWish(on=False)),
        ({}, AnywhereWish()),
        ({"first": 4096, "whole": "best"}, AnywhereWish(first=4096, whole="best")),
        ({"spans": [[0, 5], [5, 9]]}, AnywhereWish(spans=((0, 5), (5, 9)))),
        ({"whole": [0, 2]}, AnywhereWish(whole=(0, 2))),
    ],
)
def test_text_to_be_reused_anywhere_is_asked_for(
    reader: Reader, given: object, read: AnywhereWish
) -> None:
    assert reader.read({"anywhere": given}) == Wishes(anywhere=read)
    assert not reader.refused


@pytest.mark.parametrize(
    "given",
    [
        1,
        None,
        [],
        "all",
        {"every": True},
        {"first": -1},
        {"first": 4097},
        {"first": True},
        {"whole": "worst"},
        {"whole": [1025]},
        {"whole": [0] * 1025},
        {"spans": [[0, 5], [4, 9]]},
        {"spans": [[5, 5]]},
        {"spans": [[0, 5, 9]]},
        {"spans": [[0, 1 << 40]]},
        {"spans": [[0, 1.5]]},
        {"spans": [[i, i + 1] for i in range(1025)]},
        {"spans": DEEP},
    ],
)
def test_what_is_wrong_about_it_costs_all_hints(reader: Reader, given: object) -> None:
    assert reader.read({"anywhere": given, "pin": True}) is NO_WISHES
    assert reader.refused == 1
