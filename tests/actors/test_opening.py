"""A shard waits for the arena of a predecessor that is ending, and goes on trying to have one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from lmkv_ray.actors import core
from lmkv_ray.actors.loops import until
from lmkv_ray.arena import ArenaReader, ArenaWriter
from lmkv_ray.config import load_settings
from lmkv_ray.errors import ArenaError

CAPACITY = 4 << 20
SETTINGS = load_settings({"capacity": CAPACITY})


class Clock(SimpleNamespace):
    """Passes only while somebody sleeps; ``at`` says what happens when."""

    def __init__(self, **names: object) -> None:
        super().__init__(now=0.0, at={}, time_ns=time.time_ns, **names)

    def monotonic(self) -> float:
        return float(self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.at if when <= self.now]:
            self.at.pop(when)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(core, "time", clock)
    return clock


def predecessor(name: str, *, ending: bool) -> tuple[ArenaWriter, ArenaReader]:
    """Whose lock is held on; and an engine that maps the arena."""
    writer = ArenaWriter.create(name, CAPACITY)
    if ending:
        writer._tables.header["writer_pid"] = 2**22 + 1  # there is no such process any more
    return writer, ArenaReader.attach(writer.path)


def test_an_arena_that_is_unmapped_slowly_is_adopted(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, engine = predecessor("test.slowly", ending=True)
    monkeypatch.setattr(core, "UNMAP_SECONDS", 2000.0)  # of an arena of a few MiB
    clock.at[7.0] = writer.close
    heir = core.open_arena(SETTINGS, "test.slowly", restarted=True)
    assert heir.arena_id == engine.arena_id
    assert 7.0 <= clock.now < 7.5
    heir.close()
    engine.close()


@pytest.mark.parametrize("ending", [False, True])
def test_the_wait_is_bounded(clock: Clock, ending: bool) -> None:
    writer, engine = predecessor("test.bounded", ending=ending)
    heir = core.open_arena(SETTINGS, "test.bounded", restarted=True)
    assert heir.arena_id != engine.arena_id
    assert core.ADOPT_SECONDS <= clock.now < core.ADOPT_SECONDS + 0.5
    for its in (writer, heir, engine):
        its.close()


def test_an_attempt_is_made_until_it_works() -> None:
    full = ArenaError("full", next_step="wait.")
    results: Iterator[bool | ArenaError] = iter([False, full, False, True])
    count = 0

    async def attempt() -> bool:
        nonlocal count
        count += 1
        result = next(results)
        if isinstance(result, ArenaError):
            raise result
        return result

    asyncio.run(until((0.001, 0.002), attempt))
    assert count == 4
