"""A shard waits for the arena of a predecessor that is ending, and goes on trying to have one."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmkv_ray.arena import ArenaReader, ArenaWriter
from lmkv_ray.arena.capacity import MachineLimits
from lmkv_ray.arena.shortage import ShortageError
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.config import load_settings
from lmkv_ray.errors import ArenaError
from lmkv_ray.node import arena
from lmkv_ray.node.arena import open_arena
from lmkv_ray.node.loops import until
from tests.clock import FakeClock

CAPACITY = 4 << 20
SETTINGS = load_settings({"capacity": CAPACITY})


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def predecessor(name: str, *, ending: bool) -> tuple[ArenaWriter, ArenaReader]:
    """Whose lock is held on; and an engine that maps the arena."""
    writer = ArenaWriter.create(name, CAPACITY)
    if ending:
        writer._tables.header["writer_pid"] = 2**22 + 1  # there is no such process any more
    return writer, ArenaReader.attach(writer.path)


def test_an_arena_that_is_unmapped_slowly_is_adopted(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, engine = predecessor("test.slowly", ending=True)
    monkeypatch.setattr(arena, "UNMAP_SECONDS", 2000.0)  # of an arena of a few MiB
    clock.at[7.0] = writer.close
    heir = asyncio.run(arena.open_arena(SETTINGS, "test.slowly", clock, restarted=True))
    assert heir.arena_id == engine.arena_id
    assert 7.0 <= clock.now < 7.5
    heir.close()
    engine.close()


@pytest.mark.parametrize("ending", [False, True])
def test_the_wait_is_bounded(clock: FakeClock, ending: bool) -> None:
    writer, engine = predecessor("test.bounded", ending=ending)
    heir = asyncio.run(arena.open_arena(SETTINGS, "test.bounded", clock, restarted=True))
    assert heir.arena_id != engine.arena_id
    assert arena.ADOPT_SECONDS <= clock.now < arena.ADOPT_SECONDS + 0.5
    for held in (writer, heir, engine):
        held.close()


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

    asyncio.run(until((0.001, 0.002), attempt, FakeClock()))
    assert count == 4


def test_without_shared_memory_the_error_names_the_next_step(tmp_path: Path) -> None:
    missing = load_settings({"arena_dir": tmp_path / "missing"})
    for settings in (missing, missing.model_copy(update={"capacity": CAPACITY})):
        with pytest.raises(ArenaError, match="LMKV_ARENA_DIR"):
            asyncio.run(open_arena(settings, "n", SYSTEM_CLOCK, restarted=False))


def test_an_arena_is_made_within_the_limits_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of 45 MiB on a large machine; what was taken is said, with the reason."""
    monkeypatch.setattr(
        "lmkv_ray.node.arena.machine_limits",
        lambda directory, **_: MachineLimits(directory, 1 << 40, 1 << 40, container=45 << 20),
    )
    said: list[str] = []
    writer, heir = (
        asyncio.run(
            open_arena(load_settings(), name, SYSTEM_CLOCK, restarted=False, say=said.append)
        )
        for name in ("testlimits", "testlimits2")
    )
    assert writer.geometry.capacity == 9 << 20
    writer.close()
    heir.close()
    assert [s.split(":")[0] for s in said] == ["takes 9 MiB of /dev/shm"] * 2
    assert "container" in said[0]
    wish = load_settings({"capacity": "64MiB"})
    with pytest.raises(ArenaError, match="64 MiB, but the memory limit of this container"):
        asyncio.run(open_arena(wish, "testlimits", SYSTEM_CLOCK, restarted=False))


@pytest.mark.parametrize("number", [errno.ENFILE, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize(
    "what", ["pathlib.Path.read_text", "pathlib.Path.iterdir", "pathlib.Path.readlink", "os.open"]
)
def test_a_shard_that_cannot_look_for_its_arena_makes_no_other_one(
    clock: FakeClock, what: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without files for a moment would cost all chunks, and their memory once more."""
    writer = ArenaWriter.create("test.short", CAPACITY)
    engine = ArenaReader.attach(writer.path)
    writer.close()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(what, refuse)
        with pytest.raises(ShortageError):
            ArenaWriter.find_and_adopt("test.short")
    heir = ArenaWriter.find_and_adopt("test.short")
    assert heir is not None
    assert heir.arena_id == engine.arena_id
    heir.close()
    engine.close()
