"""A simulated engine: the real conversation with its shard, a copying worker, made-up prompts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from random import Random

import numpy as np

from lmkv_ray.arena import ArenaReader
from lmkv_ray.errors import LmkvError
from lmkv_ray.hints import Hints
from lmkv_ray.keys import key_array
from lmkv_ray.messages import Hello, Stage, StageReply, decode, encode
from lmkv_ray.vllm.link.conversation import Conversation
from lmkv_ray.vllm.link.slots import GrantedSlot, Slots
from tests.simulation.content import CHUNK_BYTES, SLOT_BYTES, Contents, key_of, slice_of
from tests.simulation.loop import Incarnation, VirtualLoop
from tests.simulation.machine import SimulatedMachine
from tests.simulation.network import Network, UnreachableError
from tests.simulation.story import Story, Violation

RPC_SECONDS = 5.0
HEARTBEAT_SECONDS = 1.0
RETRY_SECONDS = (0.1, 5.0)
WANT = 8
"""Free slots that an engine keeps at hand."""


class Writes:
    """Which slots are being written into, on the whole machine: never one by two."""

    def __init__(self) -> None:
        self._now: dict[tuple[int, int], str] = {}

    def begin(self, arena_id: int, slot: int, writer: str) -> None:
        other = self._now.get((arena_id, slot))
        if other is not None:
            raise Violation(f"slot {slot} is written into by {writer} and by {other}")
        self._now[arena_id, slot] = writer

    def end(self, arena_id: int, slot: int) -> None:
        self._now.pop((arena_id, slot), None)

    def died(self, writer: str) -> None:
        """A process will not write any more."""
        self._now = {at: other for at, other in self._now.items() if other != writer}


class SimulatedEngine:
    """Asks for prompts, loads what is a hit, computes and saves the rest.

    Args:
        name: the engine's id.
        machine: where it runs.
        space: its namespace.
        loop: has the virtual time.
        network: the way to its shard.
        contents: what is true of every chunk.
        writes: see ``Writes``.
        random: for prompts and pauses.
        story: what happens is told there.
    """

    def __init__(
        self,
        name: str,
        machine: SimulatedMachine,
        space: int,
        loop: VirtualLoop,
        network: Network,
        contents: Contents,
        writes: Writes,
        random: Random,
        story: Story,
    ) -> None:
        self.name = name
        self.machine = machine
        self.space = space
        self.process, self.worker_process = machine.spawn(), machine.spawn()
        self.incarnation = Incarnation(f"engine {name}")
        self.worker = Incarnation(f"worker {name}")
        self.hits = self.misses = self.saved = self.unsaved = 0
        self.reader: ArenaReader | None = None
        self.far: SimulatedEngine | None = None
        """The part of this engine on another node, for the slices of its workers there."""
        self.near: SimulatedEngine | None = None
        """The engine that this is a part of."""
        self._courier_lost = False
        self._asked: set[asyncio.Future[bytes]] = set()
        """Answers that the link or a prompt waits for."""
        self.busy = True
        """Whether it asks for prompts."""
        self._loop = loop
        self._network = network
        self._contents = contents
        self._writes = writes
        self._random = random
        self._story = story
        self._wake = asyncio.Event()
        self.slots = Slots(WANT, self._wake.set, machine.clock.monotonic)
        hello = Hello(
            engine_id=name,
            owner=self.process,
            space=space,
            model="simulated",
            slot_bytes=SLOT_BYTES,
            held=[],
            writers=[self.worker_process],
        )
        self._talk = Conversation(
            hello, self.slots, HEARTBEAT_SECONDS, monotonic=machine.clock.monotonic
        )

    def start(self) -> None:
        """Begin; see ``Incarnation``."""
        self.incarnation.run(self._begin)

    def _begin(self) -> None:
        for coroutine in (self._link(), self._work()):
            self._loop.start(coroutine)

    def end(self) -> None:
        """The scheduler's process is killed; its worker may outlive it, see ``end_worker``."""
        self.incarnation.kill()
        self.machine.processes.discard(self.process)

    def end_worker(self) -> None:
        self.worker.kill()
        self._writes.died(self.worker.name)
        self.machine.processes.discard(self.worker_process)
        if self.reader is not None:
            self.machine.readers.remove(self.reader)
            self.reader.close()
            self.reader = None

    # -- the link ---------------------------------------------------------------------------------

    async def _call(self, method: str, message: bytes, within: float = RPC_SECONDS) -> bytes:
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._asked.add(answer)
        self._loop.start(self._carry(method, message, answer))
        try:
            async with asyncio.timeout(within):
                return await answer
        finally:
            self._asked.discard(answer)

    async def _carry(self, method: str, message: bytes, answer: asyncio.Future[bytes]) -> None:
        """What the courier does; a message that has left arrives though its courier is lost."""
        name = f"shard {self.machine.name}"
        try:
            caller = self.machine if self.near is None else self.near.machine
            result = await self._network.call(caller.name, name, method, (message,))
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(result)

    def lose_courier(self) -> None:
        """The engine has to attach again, though the shard lives."""
        self._courier_lost = True
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(ConnectionError("the courier has ended"))
        self._wake.set()

    async def _link(self) -> None:
        pause = RETRY_SECONDS[0]
        while True:
            try:
                await self._attach()
                pause = RETRY_SECONDS[0]
                while True:
                    if self._courier_lost:
                        self._courier_lost = False
                        raise ConnectionError("the courier has ended")
                    if self._talk.exchange_is_due:
                        await self._exchange()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(max(self._talk.quiet_for, 0)):
                            await self._wake.wait()
                    self._wake.clear()
                    await asyncio.sleep(0.02)
            except (TimeoutError, UnreachableError, LmkvError, ConnectionError):
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS[1])

    async def _attach(self) -> None:
        welcome = self._talk.welcomed(await self._call("hello", self._talk.hello()))
        if self.reader is None or self.reader.arena_id != welcome.arena_id:
            reader = ArenaReader.attach(welcome.arena_path, welcome.arena_id)
            if self.reader is not None:
                self.machine.readers.remove(self.reader)
                self.reader.close()
            self.reader = reader
            self.machine.readers.append(reader)
        self._talk.attached(welcome)
        self._check_slots()
        self._story.tell(f"{self.name} attached, {len(welcome.grant.slots)} slots")

    async def _exchange(self) -> None:
        message, news = self._talk.exchange()
        try:
            answer = await self._call("exchange", message)
        except BaseException:
            self._talk.failed(news)
            raise
        finally:
            self._check_slots()
        self._talk.answered(news, answer)
        self._check_slots()

    def _check_slots(self) -> None:
        try:
            self.slots.validate()
        except AssertionError as error:
            raise Violation(f"{self.name}: {error}") from error

    # -- the engine -------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(self._random.expovariate(2.0))
            if self.busy and self.reader is not None and self.near is None:
                await self.prompt(self._prompt())

    def join(self, far: SimulatedEngine) -> None:
        """Run on two nodes: a chunk is a hit only if both have their slice of it."""
        self.far, far.near = far, self

    def _prompt(self) -> list[bytes]:
        family = int(self._random.paretovariate(1.2)) % 12
        length, common = self._random.randint(1, 10), self._random.randint(0, 6)
        branch = self._random.randrange(8)
        return [
            key_of(self.space, family, position, 0 if position < common else branch)
            for position in range(length)
        ]

    async def prompt(self, keys: Sequence[bytes], within: float = 2.0) -> int:
        """Load what is a hit of a run of chunks, save the rest; how many were hits."""
        hits = await self.load(keys)
        if hits < len(keys):
            await self.stage(keys[hits:], within)
            hits += await self.load(keys[hits:])
        if self.far is not None:
            hits = await self.far.slices(keys[:hits], within)
        self.hits += hits
        self.misses += len(keys) - hits
        self.slots.touch([*reversed(keys[:hits])])
        await asyncio.sleep(self._random.uniform(0, 0.05))  # the forward pass
        for key in keys[hits:]:
            self._save(key)
            if self.far is not None:
                self.far._save(slice_of(key))
        return hits

    async def slices(self, keys: Sequence[bytes], within: float) -> int:
        """Load the slices that this node has of leading chunks, where its shard says that they are;
        how many arrived. The engine asks from the other node.
        """
        mine = [slice_of(key) for key in keys]
        reply = await self.stage(mine, within, locate=True)
        reader = self.reader
        if reply is None or reader is None or reply.arena_id != reader.arena_id:
            return 0
        await asyncio.sleep(self._random.expovariate(1 / 0.01))  # until a worker copies
        for i, key in enumerate(mine):
            slot = np.array(reply.slots[i : i + 1], np.int64)
            if self.reader is not reader or not len(slot) or slot[0] < 0:
                return i
            at = int(reader.offsets(slot, CHUNK_BYTES)[0])
            copy = reader.data[at : at + CHUNK_BYTES].copy()
            if not reader.unchanged(slot, np.array(reply.generations[i : i + 1], np.uint64))[0]:
                return i
            self._contents.version(copy, key, self.name)
        return len(mine)

    async def stage(
        self, keys: Sequence[bytes], within: float, *, locate: bool = False
    ) -> StageReply | None:
        """Ask the shard for chunks from elsewhere; None if it did not answer in time.

        Args:
            keys: of the chunks.
            within: seconds.
            locate: whether the answer says where they are.
        """
        stage = Stage(
            engine_id=self.name,
            keys=b"".join(keys),
            slot_bytes=CHUNK_BYTES,
            within=within,
            locate=locate,
        )
        try:
            return decode(await self._call("stage", encode(stage), within), StageReply)
        except (TimeoutError, UnreachableError, LmkvError, ConnectionError):
            return None

    async def load(self, keys: Sequence[bytes]) -> int:
        """Copy leading chunks out of the arena; how many arrived.

        Raises:
            Violation: the bytes of one are not its own.
        """
        reader = self.reader
        if reader is None or not keys:
            return 0
        hits = reader.lookup(key_array(b"".join(keys)))
        half = CHUNK_BYTES // 2
        for i, key in enumerate(keys):
            if not hits.found[i]:
                return i
            at, nbytes = int(hits.offsets[i]), int(hits.nbytes[i])
            first = reader.data[at : at + half].copy()
            if self._random.random() < 0.3:
                await asyncio.sleep(self._random.expovariate(1 / 0.005))
            copy = np.concatenate([first, reader.data[at + half : at + nbytes]])
            if not reader.unchanged(hits.slots[i : i + 1], hits.generations[i : i + 1])[0]:
                return i
            self._contents.version(copy, key, self.name)
        return len(keys)

    def _save(self, key: bytes) -> None:
        granted = self.slots.take()
        if granted is None or self.slots.committing(key):
            if granted is not None:
                self.slots.release(granted)
            self.unsaved += 1
            self._check_slots()
            return
        written = asyncio.get_running_loop().create_future()
        self.worker.run(self._start_write, granted, key, written)
        self._loop.start(self._commit(granted, key, written))

    def _start_write(self, granted: GrantedSlot, key: bytes, written: asyncio.Future[bool]) -> None:
        self._loop.start(self._write(granted, key, written))

    async def _write(self, granted: GrantedSlot, key: bytes, written: asyncio.Future[bool]) -> None:
        """In the worker's process."""
        reader = self.reader
        clock = self.machine.clock
        if reader is None or reader.arena_id != granted.arena_id:
            written.set_result(False)
            return
        await asyncio.sleep(self._random.expovariate(1 / 0.01))
        if clock.monotonic() > granted.deadline:
            written.set_result(False)
            return
        now = asyncio.get_running_loop().time()
        data = self._contents.mint(key, self.space, now)
        view = reader.payload(granted.slot, CHUNK_BYTES)
        self._writes.begin(granted.arena_id, granted.slot, self.worker.name)
        half = CHUNK_BYTES // 2
        view[:half] = data[:half]
        slow = self._random.random() < 0.1
        await asyncio.sleep(self._random.expovariate(1 / (1.0 if slow else 0.02)))
        view[half:] = data[half:]
        self._writes.end(granted.arena_id, granted.slot)
        written.set_result(True)

    async def _commit(
        self, granted: GrantedSlot, key: bytes, written: asyncio.Future[bool]
    ) -> None:
        if await written:
            self.slots.commit(granted, key, CHUNK_BYTES, Hints(space=self.space))
            self.saved += 1
        else:
            self.slots.release(granted)
        self._check_slots()
