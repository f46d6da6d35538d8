"""How many requests the remote tier makes, and in which order."""

from __future__ import annotations

import asyncio
from pathlib import Path

from lmkv_ray.clock import SYSTEM_CLOCK, SystemClock
from lmkv_ray.keys import key_array
from lmkv_ray.tiers.format import ChunkHeader, Label
from lmkv_ray.tiers.remote import RemoteTier
from lmkv_ray.tiers.remote import tier as remote
from lmkv_ray.tiers.remote.objects import Objects, open_objects
from lmkv_ray.tiers.remote.recent import Recent, Stored
from lmkv_ray.tiers.remote.turns import Turns
from tests.tiers.harness import until
from tests.tiers.remote.store import (
    KEYS,
    NBYTES,
    SPACE,
)

MANY = [i.to_bytes(16, "little") for i in range(3125)]


class CountingObjects(Objects):
    """An empty store that answers one turn of the event loop later, and counts."""

    def __init__(self, directory: Path) -> None:
        super().__init__(open_objects(f"file://{directory}", {})._store)
        self.asked: list[str] = []
        self.held: set[str] = set()

    async def listed(self, prefix: str, within: float) -> list[str]:
        return []

    async def beginning(self, name: str, nbytes: int, within: float) -> tuple[bytes, int] | None:
        self.asked.append(name)
        await asyncio.sleep(0)
        key = bytes.fromhex(name.split("/")[-1].split(".")[0])
        if name not in self.held:
            return None
        return ChunkHeader(Label(key, SPACE, NBYTES), 0, 1, bytes(12)).pack(), 4096 + NBYTES


async def test_a_prompt_whose_first_chunk_is_missing_asks_once(tmp_path: Path) -> None:
    objects = CountingObjects(tmp_path)
    tier = RemoteTier(objects, None, SYSTEM_CLOCK)
    for _ in range(3):
        assert not (await tier.lookup(key_array(MANY), 5)).any()
    assert len(objects.asked) == 1, "and what is known to be missing is not asked again at once"
    objects.held = {tier._name(key) for key in MANY[1:1501]}
    assert (await tier.lookup(key_array(MANY[1:]), 5)).sum() == 1500
    assert 1500 < len(objects.asked) <= 1500 + 2 + remote.WIDEST_STEP


async def test_requests_take_turns(tmp_path: Path) -> None:
    objects = CountingObjects(tmp_path)
    tier = RemoteTier(objects, None, SYSTEM_CLOCK)
    objects.held = {tier._name(key) for key in MANY}
    long = asyncio.create_task(tier.lookup(key_array(MANY[100:]), 60))
    await until(lambda: len(objects.asked) > 1000)
    before = len(objects.asked)
    assert (await tier.lookup(key_array(MANY[:4]), 60)).all()
    # Three steps, each of which waits for a few of those that are inside, not for all that wait.
    assert len(objects.asked) - before < 3 * 4 * remote.IN_FLIGHT
    assert (await long).all()


async def test_turns_are_given_back_by_those_who_do_not_want_them_any_more() -> None:
    turns, order, gate = Turns(1), [], asyncio.Event()

    async def use(request: object, name: str) -> None:
        async with turns.turn(request):
            order.append(name)
            await gate.wait()

    a, b = object(), object()
    tasks = [asyncio.create_task(use(r, n)) for r, n in ((a, "a1"), (a, "a2"), (a, "a3"), (b, "b"))]
    await until(lambda: order == ["a1"])
    tasks[1].cancel()
    gate.set()
    await asyncio.wait(tasks)
    assert order == ["a1", "b", "a3"]
    tasks = [asyncio.create_task(use(a, "again")) for _ in range(2)]
    await asyncio.wait(tasks)
    assert order[-2:] == ["again", "again"]


def test_what_was_missing_is_asked_again_after_a_while() -> None:
    now = [0.0]

    class Stopped(SystemClock):
        def monotonic(self) -> float:
            return now[0]

    recent = Recent(Stopped())
    recent.put(KEYS[0], None)
    recent.put(KEYS[1], Stored(SPACE, 0))
    now[0] = 9.0
    assert recent.get(KEYS[0]) is not None
    now[0] = 11.0
    assert recent.get(KEYS[0]) is None
    assert recent.get(KEYS[1]) is not None
