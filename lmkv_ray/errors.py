"""Every error a user can meet: typed, carrying its state, and naming the next step."""

from __future__ import annotations


class LmkvError(Exception):
    """Base of all errors of lmkv_ray.

    Args:
        what: what is wrong, in one sentence.
        next_step: what the reader should do about it, in one sentence.
    """

    def __init__(self, what: str, *, next_step: str) -> None:
        super().__init__(f"{what} Next step: {next_step}")
        self.what = what
        self.next_step = next_step

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders (Ray pickles them): keep keyword arguments.
        return _rebuild, (type(self), self.what, self.next_step)


def _rebuild(cls: type[LmkvError], what: str, next_step: str) -> LmkvError:
    return cls(what, next_step=next_step)


class ConfigError(LmkvError):
    """A setting has a wrong value, or two settings contradict each other."""


class UnsupportedError(LmkvError):
    """A model, KV-cache layout, vLLM version or machine that is not supported."""


class ArenaError(LmkvError):
    """The shared memory of a node's shard cannot be created, mapped or trusted."""


class ChunkSizeError(ArenaError):
    """An arena can never hold an engine's chunks: only other settings help."""


class ConnectError(LmkvError):
    """The cache's actors cannot be reached or started."""


class TransportError(LmkvError):
    """Bytes could not be moved between two shards."""


class TierError(LmkvError):
    """A tier below memory cannot be used as it is configured."""


class TraceError(LmkvError):
    """A trace of requests cannot be read."""
