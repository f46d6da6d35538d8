"""The answer of a peer's shard to a call, within a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from lmkv_ray.clock import Clock
from lmkv_ray.fetch import Failure

T = TypeVar("T")


class NoAnswerError(Exception):
    """The peer has not answered with what was asked for."""

    def __init__(self, failure: Failure, detail: str = "") -> None:
        super().__init__(detail)
        self.failure = failure
        self.detail = detail


async def answer_of(ask: Callable[[], Awaitable[T]], deadline: float, clock: Clock) -> T:
    """The answer to a call of a peer.

    Args:
        ask: makes the call.
        deadline: monotonic seconds of the clock.
        clock: the shard's.

    Raises:
        NoAnswerError: there is none in time, or an error instead.
    """

    async def asked() -> T:
        return await ask()

    try:
        return await asyncio.wait_for(asked(), deadline - clock.monotonic())
    except TimeoutError:
        raise NoAnswerError(Failure.LATE) from None
    except Exception as error:
        # Whatever it is: the peer's death, its error, a broken network. Ray's errors are long
        # texts that end with the cause.
        cause = str(error).strip().rpartition("\n")[2]
        detail = f"{type(error).__name__}: {cause}"[:500]
        raise NoAnswerError(Failure.LOST, detail) from None
