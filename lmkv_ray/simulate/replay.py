"""A trace, replayed through memory and the tiers below it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lmkv_ray.hints import Hints
from lmkv_ray.policies import Policy, make_policy
from lmkv_ray.simulate.admissions import AdmissionRule, make_admission
from lmkv_ray.simulate.belady import Belady
from lmkv_ray.simulate.costs import ConstantCosts, Costs
from lmkv_ray.simulate.store import Store
from lmkv_ray.simulate.traces import Trace, TracedRequest

TIERS = ("memory", "disk", "remote")
BELADY = "belady"
"""The policy that knows the future; not one that can be configured."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is simulated."""

    memory: int
    """Capacity in chunks, as all of them."""
    disk: int = 0
    """0: there is none."""
    remote: int = 0
    policy: str = "arc"
    """Of every tier."""
    admission: AdmissionRule = "second_hit"
    """Which chunks are written below memory."""
    ttl: float | None = None
    """Seconds after which a chunk is not expected to be asked for again."""
    bytes_per_token: int = 131_072
    """The default: 32 layers, 8 KV heads of 128, 16 bit (Llama 3.1 8B)."""
    costs: Costs = field(default_factory=ConstantCosts)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What happened. Rates are of all chunks that were asked for."""

    setup: Setup
    requests: int
    chunks: int
    """Asked for."""
    hits: dict[str, int]
    """Chunks of leading runs, by the tier that had them."""
    written: dict[str, int]
    """Bytes, by tier."""
    read: dict[str, int]
    tokens: int
    tokens_hit: int
    ttft: tuple[float, float, float]
    """Seconds expected to the first token: mean, median, 90th percentile."""
    ttft_without: tuple[float, float, float]
    """The same if nothing were cached."""

    @property
    def hit_rate(self) -> float:
        """Chunks that need not be computed, of all."""
        return sum(self.hits.values()) / max(self.chunks, 1)

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        setup = self.setup
        return {
            "policy": setup.policy,
            "memory": setup.memory,
            "disk": setup.disk,
            "remote": setup.remote,
            "admission": setup.admission,
            "ttl": setup.ttl,
            "requests": self.requests,
            "chunks": self.chunks,
            "hit_rate": round(self.hit_rate, 6),
            "token_hit_rate": round(self.tokens_hit / max(self.tokens, 1), 6),
            "hits": self.hits,
            "bytes_written": self.written,
            "bytes_read": self.read,
            "ttft_seconds": dict(zip(("mean", "p50", "p90"), self.ttft, strict=True)),
            "ttft_seconds_without": dict(
                zip(("mean", "p50", "p90"), self.ttft_without, strict=True)
            ),
        }


class _Clock:
    """The time of the trace, and the number of the request."""

    seconds = 0.0
    request = 0


class _Replay:
    def __init__(self, trace: Trace, setup: Setup) -> None:
        self.trace = trace
        self.setup = setup
        self.clock = _Clock()
        sizes = {"memory": setup.memory, "disk": setup.disk, "remote": setup.remote}
        self.stores = {tier: Store(n, self.make_policy) for tier, n in sizes.items() if n}
        self.memory = self.stores["memory"]
        self.below = [(tier, store) for tier, store in self.stores.items() if tier != "memory"]
        self.admission = make_admission(setup.admission) if self.below else None
        self.hits = dict.fromkeys(self.stores, 0)
        self.stored = dict.fromkeys(self.stores, 0)
        self.hints_of: dict[bytes, Hints] = {}

    def make_policy(self) -> Policy:
        clock = self.clock
        if self.setup.policy == BELADY:
            requests = (request.keys for request in self.trace.requests)
            return Belady.of(requests, lambda: clock.request)
        return make_policy(self.setup.policy, clock=lambda: clock.seconds)

    def request(self, request: TracedRequest) -> dict[str, int]:
        """One prompt comes; returns its hits by tier."""
        keys, held = request.keys, self.memory.held
        found: dict[str, list[bytes]] = {tier: [] for tier, _ in self.below}
        hit: list[bytes] = []
        run = 0
        for key in keys:
            if key in held:
                hit.append(key)
            elif tier := self.tier_of(key):
                found[tier].append(key)
            else:
                break
            run += 1
        by_tier = {tier: len(hits) for tier, hits in found.items()}
        by_tier["memory"] = len(hit)
        # What lies behind a gap is computed with the rest, and is of use again from now on.
        behind = [key for key in keys[run:] if key in held]
        used = [*hit, *behind]
        used.reverse()
        self.memory.touch(used)
        for tier, store in self.below:
            if found[tier]:
                store.touch(found[tier][::-1])
        self.save(request, used)
        return by_tier

    def tier_of(self, key: bytes) -> str | None:
        """The first tier below memory that has a chunk."""
        for tier, store in self.below:
            if key in store.held:
                return tier
        return None

    def save(self, request: TracedRequest, used: list[bytes]) -> None:
        """Store in memory what is not there, and below what has earned it."""
        keys, held = request.keys, self.memory.held
        missing = [i for i, key in enumerate(keys) if key not in held]
        hints = [self.hints(request, i) for i in missing]
        stored, evicted = self.memory.put([keys[i] for i in missing], hints)
        self.stored["memory"] += len(stored)
        if self.admission is None:
            return
        self.hints_of.update(zip(stored, hints, strict=False))
        self.admission.touched(used)
        self.admission.committed(stored)
        self.admission.removed(evicted)
        admitted = []
        while (key := self.admission.take()) is not None:
            admitted.append(key)
        for tier, store in self.below:
            new = [key for key in admitted if key not in store.held]
            self.stored[tier] += len(store.put(new, [self.hints_of[key] for key in new])[0])
        for key in evicted:
            self.hints_of.pop(key, None)

    def hints(self, request: TracedRequest, i: int) -> Hints:
        ttl = self.setup.ttl
        return Hints(
            after=request.keys[i - 1] if i else b"",
            deadline=request.at + ttl if ttl is not None else None,
            session=request.session,
            category=request.category,
        )


def replay(trace: Trace, setup: Setup, on_request: Callable[[int], None] | None = None) -> Result:
    """Send the requests of a trace through memory and tiers, in order.

    A hit is a chunk of the leading run that memory or a tier has; chunks below memory are copied
    up when they are used. Bytes that other requests still wait for are not modelled: a chunk is
    there once the request before it was seen.

    Args:
        trace: the requests.
        setup: what they meet.
        on_request: called with the number of each request, for a progress bar.
    """
    state = _Replay(trace, setup)
    costs, chunk_bytes = setup.costs, setup.bytes_per_token * trace.chunk_tokens
    warm, cold = np.zeros(len(trace)), np.zeros(len(trace))
    chunks = tokens = tokens_hit = 0
    for number, request in enumerate(trace.requests):
        state.clock.seconds, state.clock.request = request.at, number
        by_tier = state.request(request)
        run = 0
        seconds = 0.0
        for tier, n in by_tier.items():
            state.hits[tier] += n
            run += n
            seconds += costs.load(tier, n * chunk_bytes)
        past = max(min(run * trace.chunk_tokens, request.tokens - 1), 0)
        warm[number] = seconds + costs.prefill(request.tokens - past, past)
        cold[number] = costs.prefill(request.tokens, 0)
        chunks += len(request.keys)
        tokens += request.tokens
        tokens_hit += past
        if on_request is not None:
            on_request(number)
    return Result(
        setup=setup,
        requests=len(trace),
        chunks=chunks,
        hits=state.hits,
        written={tier: n * chunk_bytes for tier, n in state.stored.items()},
        read={tier: n * chunk_bytes for tier, n in state.hits.items()},
        tokens=tokens,
        tokens_hit=tokens_hit,
        ttft=_summary(warm),
        ttft_without=_summary(cold),
    )


def _summary(seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float, float]:
    return (
        float(seconds.mean()),
        float(np.quantile(seconds, 0.5)),
        float(np.quantile(seconds, 0.9)),
    )
