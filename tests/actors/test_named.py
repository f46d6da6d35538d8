"""Calls of other actors end in time, also when Ray does not say where they are."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator

import pytest
from ray.exceptions import RayTaskError

from lmkv_ray.actors import named
from lmkv_ray.actors.named import NamedActor


class Method:
    """A method of a handle."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def remote(self, word: str) -> bytes:
        if self.error is not None:
            raise self.error
        return word.encode()


class Gcs:
    """Ray's head, which may hang."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.asked = 0
        self.say = Method()

    def find(self, name: str, namespace: str) -> Gcs:
        self.asked += 1
        assert self.answers.wait(30)
        return self


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gcs]:
    made = Gcs()
    monkeypatch.setattr(named, "find", made.find)
    yield made
    made.answers.set()


async def test_a_head_that_hangs_costs_the_time_given_and_one_thread(gcs: Gcs) -> None:
    actor = NamedActor("a", "n")
    gcs.answers.clear()
    began = time.monotonic()
    answers = [await actor.ask("say", "x", within=0.05) for _ in range(3)]
    answers += await asyncio.gather(*(actor.ask("say", "x", within=0.05) for _ in range(20)))
    assert time.monotonic() - began < 5
    assert set(answers) == {None}
    assert gcs.asked == 1
    assert actor.is_sought
    gcs.answers.set()
    assert await actor.ask("say", "x", within=10) == b"x"
    assert gcs.asked == 1


async def test_an_actor_that_fails_is_looked_up_again_and_says_why_once(
    gcs: Gcs, caplog: pytest.LogCaptureFixture
) -> None:
    actor = NamedActor("a", "n")
    gcs.say.error = RayTaskError("say", "the index is full", ValueError("full"))
    for _ in range(3):
        assert await actor.ask("say", "x", within=10) is None
    assert gcs.asked == 3
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "the index is full" in warnings[0].getMessage()
    gcs.say.error = None
    assert await actor.ask("say", "x", within=10) == b"x"


async def test_an_actor_that_keeps_failing_is_not_silent(
    gcs: Gcs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = NamedActor("a", "n")
    gcs.say.error = RayTaskError("say", "the index is full", ValueError("full"))
    for _ in range(3):
        assert await actor.ask("say", "x", within=10) is None
    monkeypatch.setattr(actor._complaints, "_quiet_until", 0.0)  # ten seconds later
    assert await actor.ask("say", "x", within=10) is None
    first, second = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "the index is full" in first
    assert "2 more like this" in second
