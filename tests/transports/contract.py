"""What every transport must do, as one class of tests: see ``TransportContract``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import pytest_asyncio

from lmkv_ray.arena import checksum
from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.transports import PeerInfo, Transport
from tests.transports.harness import (
    CHUNK,
    COUNT,
    Here,
    LocalPeer,
    Peers,
    RayPeer,
    content_of,
    some_keys,
)

KEYS = some_keys()
STRANGERS = some_keys(3, seed=5)
SECONDS = 30.0


@dataclass
class Pair:
    """A transport, a peer it reaches, and destinations for all its keys."""

    transport: Transport
    peer: LocalPeer | RayPeer
    info: PeerInfo
    here: Here
    destinations: list[np.ndarray]

    def fetch(self, keys: np.ndarray = KEYS, within: float = SECONDS) -> Fetch:
        return Fetch(keys, self.destinations[: len(keys)], within)

    async def outcomes(self, keys: np.ndarray = KEYS, within: float = SECONDS) -> list[Outcome]:
        """All outcomes by position; checks that each key has exactly one."""
        stream = self.transport.fetch(self.info, self.fetch(keys, within))
        outcomes = [outcome async for outcome in stream]
        assert sorted(outcome.position for outcome in outcomes) == list(range(len(keys)))
        return sorted(outcomes, key=lambda outcome: outcome.position)

    def arrived(self, position: int, key: np.ndarray) -> bool:
        content = content_of(key)
        return bool((self.destinations[position][: len(content)] == content).all())


class TransportContract:
    """Every behaviour, over one transport.

    A new transport is tested by a class ``Test...`` that has this one as its base and says how the
    transport is made. Its peer is a ``Store`` (``harness.py``), in this process or as a Ray actor,
    whose servers are those of ``lmkv_ray.transports.select.all_servers``.
    """

    peer: ClassVar[type[LocalPeer | RayPeer]] = LocalPeer
    """``RayPeer``: the peer is an actor; mark the class with ``ray``."""
    together: ClassVar[int] = 2
    """How many chunks the transport looks up before it copies the first of them."""

    def make(self, here: Here, peer: LocalPeer | RayPeer) -> Transport:
        """The transport that fetches into ``here``, in batches of two chunks (2 * ``CHUNK``).

        Args:
            here: the arena that chunks are fetched into.
            peer: the peer that is read from; only a transport that has no server needs it.
        """
        raise NotImplementedError

    @pytest_asyncio.fixture(loop_scope="module")
    async def pair(self, here: Here, peers: Peers) -> Pair:
        peer = await peers.get(self.peer)
        destinations = here.places(COUNT + len(STRANGERS))
        return Pair(self.make(here, peer), peer, peer.info(), here, destinations)

    @pytest.fixture
    def remote(self, pair: Pair) -> Pair:
        """Only transports whose peer takes part in a fetch."""
        if pair.transport.capabilities.one_sided:
            pytest.skip("the peer's process takes no part in these fetches")
        return pair

    async def test_all_chunks_arrive_bit_equal(self, pair: Pair) -> None:
        outcomes = await pair.outcomes()
        assert all(outcome.ok for outcome in outcomes)
        for outcome, key in zip(outcomes, KEYS, strict=True):
            assert pair.arrived(outcome.position, key)
            assert outcome.nbytes == CHUNK - 4096
            if pair.transport.capabilities.verified:
                assert outcome.checksum == checksum(content_of(key))

    async def test_a_missing_chunk_is_reported_and_the_others_arrive(self, pair: Pair) -> None:
        keys = np.concatenate([STRANGERS[:1], KEYS[:4], STRANGERS[1:], KEYS[4:]])
        strange = [0, 5, 6]
        outcomes = await pair.outcomes(keys)
        for position, outcome in enumerate(outcomes):
            assert outcome.failure == (Failure.MISSING if position in strange else None)
            assert outcome.ok == pair.arrived(position, keys[position])

    async def test_nothing_but_missing_chunks(self, pair: Pair) -> None:
        assert {o.failure for o in await pair.outcomes(STRANGERS)} == {Failure.MISSING}
        assert await pair.outcomes(STRANGERS[:0]) == []

    async def test_a_chunk_evicted_between_lookup_and_copy_is_never_used(self, pair: Pair) -> None:
        pair.peer.do("rewrite_after_next_lookup")
        failures = [outcome.failure for outcome in await pair.outcomes()]
        # One batch was looked up before the eviction, the others after it.
        assert set(failures) <= {Failure.CHANGED, Failure.MISSING}
        assert failures.count(Failure.CHANGED) == self.together

    async def test_a_chunk_larger_than_its_slot_is_refused(self, pair: Pair) -> None:
        pair.destinations[3] = pair.destinations[3][: CHUNK // 2]
        outcomes = await pair.outcomes()
        assert outcomes[3].failure == Failure.TOO_LARGE
        assert all(outcome.ok for outcome in outcomes if outcome.position != 3)

    async def test_chunks_become_usable_one_by_one(self, pair: Pair) -> None:
        stream = pair.transport.fetch(pair.info, pair.fetch())
        async with contextlib.aclosing(stream) as outcomes:
            first = await anext(outcomes)
            assert first.ok
            assert pair.arrived(first.position, KEYS[first.position])
            assert not pair.destinations[COUNT - 1].any(), "while others are still on their way"

    async def test_no_time_at_all_is_late(self, pair: Pair) -> None:
        assert {outcome.failure for outcome in await pair.outcomes(within=0)} == {Failure.LATE}

    async def test_a_dead_peer_fails_before_the_deadline(self, pair: Pair) -> None:
        await pair.peer.die()
        begin = time.monotonic()
        outcomes = await pair.outcomes()
        assert {outcome.failure for outcome in outcomes} == {Failure.LOST}
        assert outcomes[0].detail
        assert time.monotonic() - begin < SECONDS

    async def test_a_closed_fetch_writes_no_more(self, pair: Pair) -> None:
        stream = pair.transport.fetch(pair.info, pair.fetch())
        await anext(stream)
        await stream.aclose()
        before = [destination.copy() for destination in pair.destinations]
        assert not (await anext(stream, None))
        # A fetch to other places takes at least as long as what was left of the first.
        other = Fetch(KEYS, pair.here.places(COUNT, start=16), SECONDS)
        async for outcome in pair.transport.fetch(pair.info, other):
            assert outcome.ok
        for old, new in zip(before, pair.destinations, strict=True):
            assert (old == new).all()

    async def test_no_task_is_left(self, pair: Pair) -> None:
        await pair.outcomes()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_a_byte_flipped_on_the_wire_is_noticed(self, remote: Pair) -> None:
        remote.peer.do("set_mood", "corrupt")
        outcomes = await remote.outcomes()
        # The first chunk of each batch of two is hit.
        assert [o.failure for o in outcomes] == [Failure.CORRUPT, None] * (COUNT // 2)
        assert all(remote.arrived(o.position, KEYS[o.position]) for o in outcomes if o.ok)

    async def test_a_chunk_replaced_while_it_is_sent_is_not_damage(self, remote: Pair) -> None:
        remote.peer.do("set_mood", "replace")
        outcomes = await remote.outcomes()
        assert {o.failure for o in outcomes} <= {Failure.CHANGED, Failure.MISSING}
        assert not any(o.ok for o in outcomes[:2])

    async def test_nonsense_is_a_lost_peer(self, remote: Pair) -> None:
        remote.peer.do("set_mood", "nonsense")
        assert {outcome.failure for outcome in await remote.outcomes()} == {Failure.LOST}

    async def test_an_error_of_the_peer_is_an_outcome(self, remote: Pair) -> None:
        remote.peer.do("set_mood", "fail")
        outcomes = await remote.outcomes()
        assert {outcome.failure for outcome in outcomes} == {Failure.LOST}
        assert "does not want to" in outcomes[0].detail

    async def test_a_hanging_peer_costs_the_deadline_and_no_more(self, remote: Pair) -> None:
        remote.peer.do("set_mood", "hang_later")
        begin = time.monotonic()
        outcomes = await remote.outcomes(within=2)
        assert 1.9 < time.monotonic() - begin < SECONDS / 2
        failures = [outcome.failure for outcome in outcomes]
        assert failures == [None] * 2 + [Failure.LATE] * (COUNT - 2), "what had arrived is used"
        assert asyncio.all_tasks() == {asyncio.current_task()}
