"""What a request may say about its chunks, in vLLM's ``kv_transfer_params``.

    {"lmkv": {"pin": true, "ttl": 3600, "priority": 1, "session": "a7", "category": "agent"}}

From Python: ``SamplingParams(extra_args={"kv_transfer_params": {"lmkv": {...}}})``; over HTTP: the
field ``kv_transfer_params`` of the request's body. With ``"keys": true`` the answer's
``kv_transfer_params`` has the keys of the prompt's chunks, for ``Cache.pin`` and its like.
Nonsense is ignored and logged once: a hint never fails a request.
"""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from typing import Any

import msgspec

from lmkv_ray.hints import NO_HINTS, Hints

logger = logging.getLogger(__name__)

NAME = "lmkv"
"""Our part of ``kv_transfer_params``."""


class Wishes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request's wishes."""

    pin: bool = False
    """Do not evict its chunks to make room."""
    ttl: float | None = None
    """Seconds after which nobody will ask for them any more."""
    priority: int = 0
    """See ``Hints.priority``."""
    session: str = ""
    """See ``Hints.session``."""
    category: str = ""
    """See ``Hints.category``."""
    keys: bool = False
    """Return the keys of the prompt's chunks."""

    def hints(self) -> Hints:
        """As hints about chunks that are saved now."""
        if self == NO_WISHES:
            return NO_HINTS
        return Hints(
            pinned=self.pin,
            deadline=None if self.ttl is None else time.monotonic() + self.ttl,
            priority=self.priority,
            session=self.session,
            category=self.category,
        )


NO_WISHES = Wishes()


def wishes_of(params: Any) -> Wishes:
    """The wishes in a request's ``kv_transfer_params`` (anything at all)."""
    if not isinstance(params, dict) or NAME not in params:
        return NO_WISHES
    try:
        return msgspec.convert(params[NAME], Wishes)
    except msgspec.ValidationError as error:
        _complain(str(error))
        return NO_WISHES


@lru_cache(maxsize=64)
def _complain(what: str) -> None:
    fields = ", ".join(Wishes.__struct_fields__)
    logger.warning(
        "lmkv_ray: ignoring kv_transfer_params[%r]: %s. Known are: %s.", NAME, what, fields
    )
