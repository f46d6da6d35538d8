"""Capacities as people write them."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from lmkv_ray.errors import ConfigError
from lmkv_ray.simulate.traces import Trace

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Capacities to look at when none is named, as shares of all chunks of the trace."""


def chunks_of(text: str, chunk_bytes: int) -> int:
    """Chunks in a capacity: a plain number is chunks, one with a unit (``64GiB``) bytes.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if text.strip().isdigit():
            return int(text)
        return TypeAdapter(ByteSize).validate_python(text.strip()) // chunk_bytes
    except ValidationError:
        raise ConfigError(
            f"{text!r} is not a capacity.", next_step="give chunks (10000) or bytes (64GiB)."
        ) from None


def usual_capacities(trace: Trace) -> list[int]:
    """From little to all that was ever asked for."""
    unique = len({key for request in trace.requests for key in request.keys})
    return [max(int(unique * share), 64) for share in SHARES]
