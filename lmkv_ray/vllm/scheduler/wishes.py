"""What a request may say about its chunks, in vLLM's ``kv_transfer_params``.

    {"lmkv": {"pin": true, "ttl": 3600, "priority": 1, "session": "a7", "category": "agent"}}

From Python: ``SamplingParams(extra_args={"kv_transfer_params": {"lmkv": {...}}})``; over HTTP: the
field ``kv_transfer_params`` of the request's body. With ``"keys": true`` the answer's
``kv_transfer_params`` has the keys of the prompt's chunks, for ``Cache.pin`` and its like.

| field | value |
|---|---|
| ``pin`` | true or false; of all slots, requests may pin a share (``request_pins``) |
| ``ttl`` | a number of seconds from 0 to ten years (315,576,000) |
| ``priority`` | an integer from -16 to 16 |
| ``session``, ``category`` | up to 128 bytes of printable text (UTF-8) |
| ``keys`` | true or false |

A stranger may write anything here. One rule: if a field is unknown, or its value is none of these,
all hints of this request are ignored, and the counter ``refused_hints`` rises. The request itself
never fails. What is read is read in constant time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from lmkv_ray.complaints import Complaints, quote
from lmkv_ray.hints import MAX_PRIORITY, MAX_TTL, NO_HINTS, Hints, is_name

logger = logging.getLogger(__name__)

NAME = "lmkv"
"""Our part of ``kv_transfer_params``."""


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """One request's wishes."""

    pin: bool = False
    """Do not evict its chunks to make room."""
    ttl: float | None = None
    """Seconds after which no request will ask for them any more."""
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


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_ttl(value: Any) -> bool:
    # An integer of any size is compared exactly, and NaN is no number between two others.
    return value is None or (type(value) in (int, float) and 0 <= value <= MAX_TTL)


def _is_priority(value: Any) -> bool:
    return type(value) is int and -MAX_PRIORITY <= value <= MAX_PRIORITY


FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "pin": _is_flag,
    "ttl": _is_ttl,
    "priority": _is_priority,
    "session": is_name,
    "category": is_name,
    "keys": _is_flag,
}
"""Of each field, what may stand there."""


class WishReader:
    """Reads what requests wish.

    Args:
        refused: called for each request whose hints are ignored.
        complaints: told why.
    """

    def __init__(self, refused: Callable[[], None], complaints: Complaints | None = None) -> None:
        self._refused = refused
        self._complaints = complaints or Complaints(logger)

    def read(self, params: Any) -> Wishes:
        """The wishes in a request's ``kv_transfer_params``, which may be anything at all."""
        if type(params) is not dict or NAME not in params:
            return NO_WISHES
        given = params[NAME]
        if (wrong := _wrong(given)) is None:
            return Wishes(**given)
        self._refused()
        self._complaints.say(
            f"a request's hints are ignored: kv_transfer_params[{NAME!r}] {wrong}. "
            "Next step: see the limits in lmkv_ray/vllm/scheduler/wishes.py."
        )
        return NO_WISHES


def _wrong(given: Any) -> str | None:
    """What is wrong with our part; None: nothing."""
    if type(given) is not dict:
        return f"is {quote(given)}, not an object"
    if len(given) > len(FIELDS):
        return f"has {len(given)} fields; there are {len(FIELDS)}: {', '.join(FIELDS)}"
    for name, value in given.items():
        if type(name) is not str or name not in FIELDS:
            return f"has an unknown field, {quote(name)}; known are {', '.join(FIELDS)}"
        if not FIELDS[name](value):
            return f"has a field {name!r} with a value that is not allowed"
    return None
