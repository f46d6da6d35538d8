"""A network that delays, loses, repeats and damages, and can be cut in one direction."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from lmkv_ray.errors import LmkvError
from lmkv_ray.transports import ChunkBatch
from tests.simulation.loop import Incarnation, VirtualLoop
from tests.simulation.story import Story

BYTES_PER_SECOND = 1e9
REPEATED = frozenset({"delta", "catch_up", "lookup", "address", "rooms"})
"""Calls that may arrive twice: a caller repeats them anyway."""


class UnreachableError(Exception):
    """The service has just ended, or there is none."""


@dataclass
class _Service:
    machine: str
    incarnation: Incarnation
    methods: object
    waiting: set[asyncio.Future[Any]] = field(default_factory=set)
    """Answers that somebody waits for."""


class Network:
    """Carries calls between machines.

    Args:
        loop: has the virtual time.
        random: for all that is a matter of chance.
        story: what happens is told there.
    """

    def __init__(self, loop: VirtualLoop, random: Random, story: Story) -> None:
        self._loop = loop
        self.cuts: set[tuple[str, str]] = set()
        """Machines from which nothing arrives at others: (from, to)."""
        self.loss = 0.0
        self.repeats = 0.0
        self.damage = 0.0
        self.delay = 0.001
        """The mean of a message's delay, in seconds."""
        self._services: dict[str, _Service] = {}
        self._random = random
        self._story = story

    def serve(self, name: str, machine: str, incarnation: Incarnation, methods: object) -> None:
        """A service can be called from now on, in place of the one before it."""
        self._services[name] = _Service(machine, incarnation, methods)

    def ended(self, name: str) -> None:
        """The process of a service has ended; callers learn of it a moment later."""
        service = self._services.pop(name, None)
        for answer in service.waiting if service is not None else ():
            if not answer.done():
                answer.set_exception(UnreachableError(f"{name} has ended"))

    async def call(
        self, machine: str, name: str, method: str, arguments: tuple[object, ...]
    ) -> Any:
        """Call a service; what is lost is never answered."""
        service = self._services.get(name)
        if service is None:
            await asyncio.sleep(self._delay())
            raise UnreachableError(name)
        await self.travel(machine, service.machine, 0)
        service = self._services.get(name)
        if service is None or not service.incarnation.alive:
            raise UnreachableError(name)
        if method in REPEATED and self._random.random() < self.repeats:
            again: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            again.add_done_callback(_forget)
            service.incarnation.run(self._start, service, method, arguments, again)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        service.waiting.add(answer)
        try:
            service.incarnation.run(self._start, service, method, arguments, answer)
            result = await answer
        finally:
            service.waiting.discard(answer)
        nbytes = 0
        if isinstance(result, ChunkBatch):
            result = self._pack(result)
            nbytes = sum(chunk.nbytes for chunk in result.chunks)
        await self.travel(service.machine, machine, nbytes)
        return result

    def _start(
        self,
        service: _Service,
        method: str,
        arguments: tuple[object, ...],
        answer: asyncio.Future[Any],
    ) -> None:
        self._loop.start(_answer(service, method, arguments, answer))

    async def travel(self, start: str, end: str, nbytes: int) -> None:
        """Return when bytes have arrived at another machine; never if they are lost."""
        """Return when a message from one machine has arrived at another; never if it is lost."""
        if (start, end) in self.cuts or (start != end and self._random.random() < self.loss):
            await asyncio.get_running_loop().create_future()  # nothing arrives, ever
        await asyncio.sleep(self._delay() + nbytes / BYTES_PER_SECOND)
        if (start, end) in self.cuts:
            await asyncio.get_running_loop().create_future()

    def _delay(self) -> float:
        return self._random.expovariate(1 / self.delay)

    def _pack(self, batch: ChunkBatch) -> ChunkBatch:
        """The bytes as they leave the machine; a few of them may arrive damaged."""
        chunks = [chunk.copy() for chunk in batch.chunks]
        for chunk in chunks:
            if self._random.random() < self.damage:
                chunk[self._random.randrange(len(chunk))] ^= 0xFF
        return ChunkBatch(batch.nbytes.copy(), batch.checksums.copy(), chunks)


async def _answer(
    service: _Service, method: str, arguments: tuple[object, ...], answer: asyncio.Future[Any]
) -> None:
    try:
        result = getattr(service.methods, method)(*arguments)
        if inspect.isawaitable(result):
            result = await result
    except Exception as error:
        if not answer.done():
            answer.set_exception(error)
    else:
        if not answer.done():
            answer.set_result(result)


def _forget(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


class SimulatedNeighbour:
    """See ``lmkv_ray.neighbours.Neighbour``."""

    def __init__(self, network: Network, machine: str, name: str) -> None:
        self._network = network
        self._machine = machine
        self._name = name

    async def ask(self, method: str, *arguments: object, within: float) -> bytes | None:
        try:
            async with asyncio.timeout(max(within, 0)):
                answer: bytes = await self.call(method, *arguments)
                return answer
        except (TimeoutError, UnreachableError, LmkvError):
            return None

    def call(self, method: str, *arguments: object) -> Awaitable[Any]:
        return self._network.call(self._machine, self._name, method, arguments)


class SimulatedNeighbours:
    """See ``lmkv_ray.neighbours.Neighbours``."""

    def __init__(self, network: Network, machine: str) -> None:
        self._network = network
        self._machine = machine

    def shard(self, node_id: str) -> SimulatedNeighbour:
        return SimulatedNeighbour(self._network, self._machine, f"shard {node_id}")

    def part(self, number: int) -> SimulatedNeighbour:
        return SimulatedNeighbour(self._network, self._machine, f"directory {number}")

    def forget(self, node_id: str) -> None:
        pass
