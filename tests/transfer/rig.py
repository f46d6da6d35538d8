"""Both lanes on a shuffled device, beside a model that writes into blocks, without threads."""

from __future__ import annotations

import ctypes
import time
from functools import partial

from lmkv_ray.transfer.base import Bytes, Ended, Load, Save
from lmkv_ray.transfer.device import Direction
from lmkv_ray.transfer.device_engine import make_group
from lmkv_ray.transfer.health import EngineHealth
from lmkv_ray.transfer.lane import CopyJob, Lane
from lmkv_ray.transfer.ring import Ring
from tests.transfer.cases import SLOTS, Case, random_bytes
from tests.transfer.fake_arena import FakeArena
from tests.transfer.shuffled_device import ShuffledDevice

RING_SLOTS = 2
AHEAD = 3


class Rig:
    """One case's engine. The case's jobs may be run as loads and as saves."""

    def __init__(self, case: Case, device: ShuffledDevice) -> None:
        self.case = case
        self.device = device
        self.cache = random_bytes(device.random.randrange(1 << 30), case.cache_bytes)
        self.arena = FakeArena(SLOTS, case.slot_bytes, order=case.order)
        self.arena.data[:] = random_bytes(device.random.randrange(1 << 30), len(self.arena.data))
        self.health = EngineHealth("the shuffled device")
        self.rings = []
        self.lanes = []
        group = make_group(
            device,
            case.layout,
            cache_bytes=case.cache_bytes,
            slot_bytes=case.ring_slot_bytes,
            direct_bytes=case.direct_bytes,
        )
        for direction in Direction:
            ring = Ring(
                device,
                slots=RING_SLOTS,
                slot_bytes=case.ring_slot_bytes,
                tables=AHEAD,
                targets=group.planner.targets,
            )
            lane = Lane(
                device,
                direction,
                [group],
                cache=self.cache.ctypes.data,
                ring=ring,
                health=self.health,
                registered=lambda arena, at: at % 2 == 0,
                ahead=AHEAD,
            )
            self.rings.append(ring)
            self.lanes.append(lane)
        self.loads, self.saves = self.lanes

    def model_writes(self, cache: Bytes) -> None:
        """Queue a step of the model that leaves the cache's blocks of the case like ``cache``."""
        mine, theirs = self.cache.ctypes.data, cache.ctypes.data
        for _, at, nbytes in self.case.pairs():
            step = partial(ctypes.memmove, mine + at, theirs + at, nbytes)
            self.device.compute.work.append(step)

    def load(self) -> Load:
        case = self.case
        generations = self.arena.generations[case.slots].copy()
        return Load(self.arena.arena_id, case.slots, generations, case.blocks, case.skip)

    def save(self, deadline: float | None = None) -> Save:
        deadline = time.monotonic() + 600 if deadline is None else deadline
        return Save(self.arena.arena_id, self.case.slots, self.case.blocks, deadline)

    def submit(self, *copies: Load | Save) -> None:
        lane = self.loads if isinstance(copies[0], Load) else self.saves
        lane.submit(CopyJob(copies, self.arena, 0, self.device.mark()))

    def turn(self) -> bool:
        """The host or the device does something; False if nothing is left."""
        if self.device.random.random() < 0.2:
            for lane in self.device.random.sample(self.lanes, 2):
                lane.pump()
            return True
        if self.device.step():
            return True
        busy = [lane.pump() for lane in self.lanes]
        return any(busy)

    def run(self) -> list[Ended]:
        """Until nothing is left to do; all that ended."""
        for _ in range(100_000):
            if not self.turn() and not any(lane.busy for lane in self.lanes):
                return self.ended()
        raise TimeoutError("it hangs")

    def ended(self) -> list[Ended]:
        return [ended for lane in self.lanes for ended in lane.take_ended()]

    def nothing_is_held(self) -> bool:
        full = AHEAD if self.case.ring_slot_bytes else 0
        return all(ring.tables == full for ring in self.rings)
