"""What the engine's thread keeps of a question that the link asks for it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lmkv_ray.messages import StageReply


@dataclass(slots=True)
class StageTicket:
    """A stage under way, or over."""

    deadline: float
    """``time.monotonic()`` after which no request waits for it any more."""
    reply: StageReply | None = None
    over: bool = False

    @property
    def pending(self) -> bool:
        """Whether an answer may still come in time."""
        return not self.over and time.monotonic() < self.deadline
