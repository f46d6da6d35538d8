"""What loading and computing take, for the expected time to first token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class Costs(Protocol):
    """Anything that knows how long things take; all in seconds."""

    def prefill(self, new: int, past: int) -> float:
        """Computing ``new`` tokens behind ``past`` ones."""
        ...

    def load(self, tier: str, nbytes: int) -> float:
        """Bringing bytes from a tier to the engine."""
        ...


@dataclass(frozen=True)
class Rate:
    """A source to load from."""

    bytes_per_second: float
    latency: float = 0.0
    """Seconds, once for each request."""


@dataclass(frozen=True)
class ConstantCosts:
    """Constant rates, without queues: time to first token of an otherwise idle engine.

    The defaults are those of an 8B model in 16 bit on one H100: what a user of another machine
    should replace.
    """

    prefill_tokens_per_second: float = 10_000.0
    tiers: dict[str, Rate] = field(
        default_factory=lambda: {
            "memory": Rate(50e9),
            "disk": Rate(5e9, 1e-3),
            "remote": Rate(1e9, 20e-3),
        }
    )

    def prefill(self, new: int, past: int) -> float:
        """See ``Costs``."""
        return new / self.prefill_tokens_per_second

    def load(self, tier: str, nbytes: int) -> float:
        """See ``Costs``."""
        rate = self.tiers[tier]
        return rate.latency + nbytes / rate.bytes_per_second if nbytes else 0.0
