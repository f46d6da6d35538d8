"""One seed: a cluster, its faults, and the checks."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.simulation.cluster import Cluster
from tests.simulation.engine import SimulatedEngine
from tests.simulation.faults import Faults
from tests.simulation.invariants import Checks, check_calm
from tests.simulation.loop import NothingLeftError, VirtualLoop
from tests.simulation.story import Story, Violation

CHECK_SECONDS = 0.25
CALM_SECONDS = 30.0
"""After the last fault everything must be well within so long."""


@dataclass(frozen=True)
class Result:
    """What became of a seed."""

    seed: int
    violation: str | None
    story: str
    node_seconds: float
    """Simulated."""
    seconds: float
    """Taken."""
    hits: int
    saved: int


def run(seed: int) -> Result:
    """Simulate one seed.

    Args:
        seed: decides everything.
    """
    random = Random(seed)
    loop = VirtualLoop(random)
    story = Story(loop.time)
    nodes = random.randint(2, 4)
    parts, disks, bucket = random.randint(1, 2), random.random() < 0.5, random.random() < 0.3
    cluster = Cluster(loop, random, story, nodes, parts, disks, bucket)
    violation = None
    failures: list[str] = []
    loop.set_exception_handler(lambda _, context: failures.append(_text(context)))
    began = time.process_time()
    logging.disable(logging.CRITICAL)
    if not gc.get_freeze_count():
        gc.freeze()  # what was imported need not be looked at again after each seed
    enabled = gc.isenabled()
    gc.disable()  # what a killed process leaves must not be finalised while others run
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(_scenario(cluster, failures))
    except Violation as error:
        violation = str(error)
    except NothingLeftError:
        violation = "everything waits for something that never happens"
    finally:
        seconds = time.process_time() - began
        simulated = loop.time() * nodes
        asyncio.set_event_loop(None)
        _dispose(cluster, loop)
        logging.disable(logging.NOTSET)
        if enabled:
            gc.enable()
    engines = cluster.engines.values()
    return Result(
        seed,
        violation,
        str(story),
        simulated,
        seconds,
        sum(engine.hits for engine in engines),
        sum(engine.saved for engine in engines),
    )


async def _scenario(cluster: Cluster, failures: list[str]) -> None:
    random, loop = cluster.random, cluster.loop
    faults, checks = Faults(cluster), Checks(cluster)
    await cluster.start()
    ends = loop.time() + random.uniform(10, 40)
    strikes = loop.time() + random.uniform(0, 5)
    calm = random.choice([0.2, 0.5, 1.5])
    while loop.time() < ends:
        await asyncio.sleep(CHECK_SECONDS)
        _verify(checks, failures)
        if loop.time() > strikes:
            faults.strike()
            strikes = loop.time() + random.expovariate(1 / calm)
    faults.heal()
    healed = loop.time()
    while loop.time() < healed + CALM_SECONDS:
        if loop.time() > healed + CALM_SECONDS / 2:
            for engine in cluster.engines.values():
                engine.busy = False
        await asyncio.sleep(CHECK_SECONDS)
        _verify(checks, failures)
    await _soon(lambda: check_calm(cluster))
    await _check_reach(cluster)
    _verify(checks, failures, whole=True)
    await _soon(lambda: check_calm(cluster))


async def _reach(cluster: Cluster, engine: SimulatedEngine, key: bytes, other: str) -> None:
    """Have an engine load a chunk that another node holds: it may take a moment until the directory
    knows, and the chunk may be evicted everywhere meanwhile.

    Raises:
        Violation: the engine cannot have it.
    """
    for _ in range(20):
        await engine.stage([key], 5.0)
        if await engine.load([key]):
            return
        shards = cluster.shards.values()
        if not any(key in s.node.shard.state.chunks for s in shards if s.node is not None):
            return
        await asyncio.sleep(0.2)
    raise Violation(f"{engine.machine.name} cannot have {key.hex()[:8]}, which {other} holds")


async def _soon(holds: Callable[[], None]) -> None:
    """Wait for a condition that messages under way may break for a moment.

    Raises:
        Violation: it does not come true.
    """
    for _ in range(50):
        try:
            holds()
            return
        except Violation:
            await asyncio.sleep(0.1)
    holds()


async def _check_reach(cluster: Cluster) -> None:
    """What some node holds is a hit on every other one.

    Raises:
        Violation: it is not.
    """
    for name in cluster.machines:
        engines = [e for e in cluster.engines.values() if e.machine.name == name]
        for engine in engines[:1]:
            for other in cluster.machines:
                if other == name:
                    continue
                held = [
                    key
                    for key in cluster.some_keys(other, 6)
                    if cluster.shards[other].node.shard.state.chunks.space(key) == engine.space  # type: ignore[union-attr]
                ]
                for key in held[:2]:
                    await _reach(cluster, engine, key, other)


def _verify(checks: Checks, failures: list[str], *, whole: bool = False) -> None:
    if failures:
        raise Violation(failures[0])
    checks.check(whole=whole)


def _text(context: dict[str, object]) -> str:
    error = context.get("exception")
    if isinstance(error, Violation):
        return str(error)
    return f"{context.get('message')}: {error!r}"


def _dispose(cluster: Cluster, loop: VirtualLoop) -> None:
    """Let go of everything. Finalisers run now, when nothing of the run is looked at any more; the
    ``finally`` blocks of killed processes fail then, as they should.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for engine in cluster.engines.values():
            engine.incarnation.kill()
            engine.worker.kill()
        for shard in cluster.shards.values():
            shard.incarnation.kill()
        loop.set_exception_handler(lambda *_: None)
        loop.tasks.clear()
        loop.close()
        gc.collect()
    sys.unraisablehook = hook
