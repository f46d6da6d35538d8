"""The simulated card keeps what ``Transport`` promises, whatever the network does."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.transports import PeerInfo, Transport, Transports
from tests.simulation.loop import VirtualLoop
from tests.simulation.machine import SimulatedClock
from tests.simulation.network import Network
from tests.simulation.story import Story
from tests.simulation.transport import SimulatedServer, SimulatedTransport, Wire
from tests.transports.harness import CHUNK, COUNT, Here, Store, content_of, some_keys

KEYS = some_keys()
SECONDS = 5.0


class World:
    """Two machines and a card between them."""

    def __init__(self, seed: int) -> None:
        random = Random(seed)
        self.loop = VirtualLoop(random)
        self.network = Network(self.loop, random, Story(self.loop.time))
        self.store = Store()
        self.here = Here()
        self.alive = True
        self.places = self.here.places(COUNT)
        clock = SimulatedClock(self.loop, random)
        wire = Wire(
            self.network.travel,
            lambda _: self.store.reader if self.alive else None,
            lambda: self.network.damage,
        )
        card = SimulatedTransport("here", wire, clock, random)
        self.transport: Transport = Transports([card], "auto", clock).choose(self.peer)

    @property
    def peer(self) -> PeerInfo:
        return replace(self.store.info(), offers={"simulated": SimulatedServer().offer("")})

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Under virtual time; with pending timers the loop always has something to wait for."""
        return self.loop.run_until_complete(work)

    def fetched(self, happens: Callable[[], object] = lambda: None, at: float = 0) -> list[Outcome]:
        """Fetch everything; something happens on the way."""

        async def fetch() -> list[Outcome]:
            self.loop.call_later(at, happens)
            stream = self.transport.fetch(self.peer, Fetch(KEYS, self.places, SECONDS))
            return [outcome async for outcome in stream]

        outcomes: list[Outcome] = self.run(fetch())
        assert sorted(outcome.position for outcome in outcomes) == list(range(COUNT))
        for outcome in outcomes:
            assert not outcome.ok or self.arrived(outcome.position), "wrong bytes"
        return outcomes

    def arrived(self, position: int) -> bool:
        content = content_of(KEYS[position])
        return bool((self.places[position][: len(content)] == content).all())

    def close(self) -> None:
        self.run(self.store.close())
        self.run(self.here.close())
        self.loop.close()


@pytest.fixture
def world() -> Iterator[World]:
    with contextlib.closing(World(1)) as world:
        yield world


def failures(outcomes: list[Outcome]) -> Counter[Failure | None]:
    return Counter(outcome.failure for outcome in outcomes)


def test_a_fetch_takes_the_time_of_its_network_and_a_seed_repeats_it() -> None:
    ends = []
    for seed in (1, 1, 2):
        with contextlib.closing(World(seed)) as world:
            assert failures(world.fetched()) == {None: COUNT}
            ends.append(world.loop.time())
    assert ends[0] == ends[1] != ends[2]
    assert COUNT * CHUNK / 1e9 / 2 < ends[0] < 1


@pytest.mark.parametrize("cut", [("here", "peer"), ("peer", "here")])
def test_a_cut_in_either_direction_costs_the_deadline(world: World, cut: tuple[str, str]) -> None:
    world.network.cuts.add(cut)
    assert failures(world.fetched()) == {Failure.LATE: COUNT}
    assert world.loop.time() == pytest.approx(SECONDS)


def test_what_a_lossy_network_loses_is_late(world: World) -> None:
    world.network.loss = 0.1
    outcomes = failures(world.fetched())
    assert set(outcomes) == {None, Failure.LATE}


def test_every_damaged_byte_is_noticed(world: World) -> None:
    world.network.damage = 1.0
    assert failures(world.fetched()) == {Failure.CORRUPT: COUNT}


def test_a_chunk_replaced_between_its_halves_is_never_used() -> None:
    """At many moments: what is replaced on the way arrives whole, changed or not at all."""
    seen: Counter[Failure | None] = Counter()
    for seed in range(20):
        with contextlib.closing(World(seed)) as world:
            world.store.mood = "replace"
            seen += failures(world.fetched(world.store.maybe_replace, at=0.002 * seed))
    assert set(seen) == {None, Failure.CHANGED, Failure.MISSING}


def test_a_peer_that_ends_in_the_middle_is_lost_at_once(world: World) -> None:
    def end() -> None:
        world.alive = False

    outcomes = failures(world.fetched(end, at=0.02))
    assert set(outcomes) == {None, Failure.LOST}
    assert world.loop.time() < 1
    assert failures(world.fetched()) == {Failure.LOST: COUNT}


def test_a_closed_fetch_writes_no_more(world: World) -> None:
    async def close_after_one() -> list[np.ndarray]:
        stream = world.transport.fetch(world.peer, Fetch(KEYS, world.places, SECONDS))
        async with contextlib.aclosing(stream) as outcomes:
            assert (await anext(outcomes)).ok
        before = [place.copy() for place in world.places]
        await asyncio.sleep(SECONDS)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return before

    before = world.run(close_after_one())
    for old, new in zip(before, world.places, strict=True):
        assert (old == new).all()
    assert not world.arrived(COUNT - 1), "it was closed in the middle"
