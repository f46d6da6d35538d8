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
| ``anywhere`` | true or false: reuse stored text wherever it stands; or an ``AnywhereWish`` |

A stranger may write anything here. One rule: if a field is unknown, or its value is none of these,
all hints of this request are ignored, and the counter ``refused_hints`` rises. The request itself
never fails. What is read is read in constant time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from lmkv_ray.complaints import Complaints, quote
from lmkv_ray.hints import MAX_PRIORITY, MAX_TTL, NO_HINTS, Hints, is_name

logger = logging.getLogger(__name__)

NAME = "lmkv"
"""Our part of ``kv_transfer_params``."""


MAX_SPANS = 1024
MAX_FIRST = 4096
MAX_TOKENS = 1 << 31


class AnywhereWish(msgspec.Struct, frozen=True, kw_only=True):
    """What a request says about text that is reused anywhere in its prompt."""

    on: bool = True
    """Whether it is, whatever the engine's setting ``anywhere`` says (unless it is off)."""
    spans: tuple[tuple[int, int], ...] = ()
    """(begin, end) of documents in tokens of the prompt, ascending, at most ``MAX_SPANS``: what is
    reused ends at their borders. None are given: what is found decides."""
    first: int = 0
    """Of each reused text so many tokens are computed again, at most ``MAX_FIRST``."""
    whole: Literal["best"] | tuple[int, ...] | None = None
    """Documents that are computed again as a whole: numbers of spans (or of what is found), or
    ``best``: the one that shares most with the end of the prompt. None: the engine's choice."""

    @classmethod
    def of(cls, given: Any) -> AnywhereWish:
        """From what ``_is_anywhere`` has let pass."""
        if type(given) is bool:
            return cls(on=given)
        whole = given.get("whole")
        return cls(
            spans=tuple((begin, end) for begin, end in given.get("spans", ())),
            first=given.get("first", 0),
            whole=tuple(whole) if type(whole) is list else whole,
        )


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
    anywhere: AnywhereWish | None = None
    """None: nothing was said."""

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


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_anywhere(value: Any) -> bool:
    if type(value) is not dict:
        return type(value) is bool
    if not value.keys() <= {"spans", "first", "whole"}:
        return False
    spans, whole = value.get("spans", []), value.get("whole", [])
    at = 0
    if type(spans) is not list or len(spans) > MAX_SPANS:
        return False
    for span in spans:
        if type(span) is not list or len(span) != 2:
            return False
        if not (all(_is_count(number, MAX_TOKENS) for number in span) and at <= span[0] < span[1]):
            return False
        at = span[1]
    documents = type(whole) is list and len(whole) <= MAX_SPANS
    return _is_count(value.get("first", 0), MAX_FIRST) and (
        whole == "best" or (documents and all(_is_count(number, MAX_SPANS) for number in whole))
    )


FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "pin": _is_flag,
    "ttl": _is_ttl,
    "priority": _is_priority,
    "session": is_name,
    "category": is_name,
    "keys": _is_flag,
    "anywhere": _is_anywhere,
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
            if "anywhere" in given:
                given = given | {"anywhere": AnywhereWish.of(given["anywhere"])}
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
