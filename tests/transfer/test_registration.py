"""Registration: what has memory is registered, in whole extents, and let go of when nothing uses
it.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from lmkv_ray.transfer.registration import Registration
from tests.transfer.fake_arena import FakeArena

EXTENT = 4096
EXTENTS = 8


class FakeRegistry:
    """Registers at most ``limit`` pieces; remembers who registered."""

    name = "a fake"

    def __init__(self, limit: int = 99) -> None:
        self.limit = limit
        self.pieces: dict[int, int] = {}
        self.calls = 0
        self.threads: set[str] = set()

    def enter(self) -> None:
        pass

    def register(self, address: int, nbytes: int) -> None:
        self.calls += 1
        self.threads.add(threading.current_thread().name)
        if len(self.pieces) >= self.limit:
            raise RuntimeError("no more")
        taken = [range(a, a + n) for a, n in self.pieces.items()]
        assert not any(address in r or address + nbytes - 1 in r for r in taken), "registered twice"
        self.pieces[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.pieces[address]


class GrowingArena(FakeArena):
    """Extents are given memory one by one."""

    def __init__(self) -> None:
        super().__init__(EXTENTS, EXTENT)
        self.extent_bytes = EXTENT
        self.parts: list[tuple[int, int]] = []

    def grow(self, *extents: int) -> None:
        self.parts += [(extent * EXTENT, EXTENT) for extent in extents]
        self.grown = True

    def assigned(self) -> list[tuple[int, int]]:
        return list(self.parts)


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def registration(registry: FakeRegistry) -> Iterator[Registration]:
    registration = Registration(registry, piece_bytes=2 * EXTENT)
    yield registration
    registration.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def covered(registration: Registration, arena: FakeArena) -> list[int]:
    extents: list[int] = np.flatnonzero(
        registration.covers(arena, np.arange(EXTENTS) * EXTENT + 7)
    ).tolist()
    return extents


def test_what_has_memory_is_pinned_as_it_grows(
    registry: FakeRegistry, registration: Registration
) -> None:
    arena = GrowingArena()
    arena.grow(0, 1, 2, 5)
    registration.attach(arena)
    wait_until(lambda: covered(registration, arena) == [0, 1, 2, 5])
    base = arena.data.ctypes.data
    expected = {base: 2 * EXTENT, base + 2 * EXTENT: EXTENT, base + 5 * EXTENT: EXTENT}
    assert registry.pieces == expected
    registration.look()  # nothing new
    arena.grow(3, 7)
    registration.look()
    wait_until(lambda: covered(registration, arena) == [0, 1, 2, 3, 5, 7])
    assert registry.calls == 5
    wait_until(lambda: not arena.grown)
    registration.close()
    assert registry.pieces == {}


def test_an_arena_that_nothing_uses_is_let_go_of(
    registry: FakeRegistry, registration: Registration
) -> None:
    held, new = [GrowingArena()], GrowingArena()
    held[0].grow(0)
    new.grow(1)
    base = held[0].data.ctypes.data
    registration.attach(held[0])
    wait_until(lambda: covered(registration, held[0]) == [0])
    registration.attach(new)
    wait_until(lambda: covered(registration, new) == [1])
    assert base in registry.pieces, "a copy may still be under way"
    held.clear()
    gc.collect()
    wait_until(lambda: base not in registry.pieces)
    assert covered(registration, new) == [1]


def test_refusal_is_said_once_and_copies_go_on(caplog: pytest.LogCaptureFixture) -> None:
    registry = FakeRegistry(limit=1)
    registration = Registration(registry, piece_bytes=EXTENT)
    arena = GrowingArena()
    arena.grow(0, 2)
    registration.attach(arena)
    wait_until(lambda: "cannot register" in caplog.text)
    arena.grow(4)
    registration.look()
    wait_until(lambda: not arena.grown)
    registration.close()
    assert caplog.text.count("cannot register") == 1
    assert registry.calls == 2
    assert "ulimit" in caplog.text


def test_nothing_is_pinned_of_an_arena_that_is_not_attached(registration: Registration) -> None:
    assert covered(registration, GrowingArena()) == []


def test_an_arena_is_prepared_by_the_caller(
    registry: FakeRegistry, registration: Registration
) -> None:
    arena = GrowingArena()
    arena.grow(0, 1, 2)
    assert registration.prepare(arena, 60) == (3 * EXTENT, 3 * EXTENT)
    assert covered(registration, arena) == [0, 1, 2]
    assert registry.threads == {threading.current_thread().name}
    registration.attach(arena)
    wait_until(lambda: not arena.grown)
    assert registry.calls == 2, "nothing is registered twice"
    arena.grow(5)
    registration.look()
    wait_until(lambda: covered(registration, arena) == [0, 1, 2, 5])
    assert "lmkv-register" in registry.threads


def test_between_prepare_and_attach_the_device_is_let_alone(
    registry: FakeRegistry, registration: Registration
) -> None:
    """A graph may be captured then."""
    arena, other = GrowingArena(), GrowingArena()
    arena.grow(0, 1, 2, 3)
    other.grow(6)
    assert registration.prepare(arena, 0) == (0, 4 * EXTENT), "there was no time"
    registration.attach(other)
    wait_until(lambda: covered(registration, other) == [6])  # the thread came by
    assert registry.calls == 1
    registration.attach(arena)
    wait_until(lambda: covered(registration, arena) == [0, 1, 2, 3])


def test_preparing_ends_in_time(registry: FakeRegistry, registration: Registration) -> None:
    arena = GrowingArena()
    arena.grow(0, 1, 2, 3, 4)
    register = registry.register

    def slow(address: int, nbytes: int) -> None:
        register(address, nbytes)
        time.sleep(0.05)

    registry.register = slow  # type: ignore[method-assign]
    assert registration.prepare(arena, 0.02) == (2 * EXTENT, 5 * EXTENT), "no piece begins too late"


def test_a_wrong_guess_is_let_go_of(registry: FakeRegistry, registration: Registration) -> None:
    guess, right = [GrowingArena()], GrowingArena()
    guess[0].grow(0)
    right.grow(1)
    registration.prepare(guess[0], 60)
    (base,) = registry.pieces
    registration.attach(right)
    wait_until(lambda: covered(registration, right) == [1])
    guess.clear()
    gc.collect()
    wait_until(lambda: base not in registry.pieces)


def test_a_refusal_while_preparing_costs_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    registration = Registration(FakeRegistry(limit=1), piece_bytes=EXTENT)
    arena = GrowingArena()
    arena.grow(0, 2, 4)
    assert registration.prepare(arena, 60) == (EXTENT, 3 * EXTENT)
    assert arena.grown, "the rest is faulted in later, in the background"
    assert "cannot register" in caplog.text
    registration.attach(arena)
    wait_until(lambda: not arena.grown)
    registration.close()
