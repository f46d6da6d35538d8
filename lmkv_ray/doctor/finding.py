"""What the doctor found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lmkv_ray.errors import LmkvError


class Level(Enum):
    """How much a finding matters."""

    GOOD = "good"
    NOTE = "note"
    """Works, but worse than it could, or will not work in a case that may come."""
    BAD = "bad"
    """Does not work."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    about: str
    """What was looked at, in a word or two."""
    what: str
    """What was seen, in one sentence."""
    next_step: str = ""
    """What the reader should do; empty if there is nothing to do."""


def good(about: str, what: str) -> Finding:
    """It works."""
    return Finding(Level.GOOD, about, what)


def note(about: str, what: str, next_step: str) -> Finding:
    """It works, but."""
    return Finding(Level.NOTE, about, what, next_step)


def bad(about: str, what: str, next_step: str) -> Finding:
    """It does not work."""
    return Finding(Level.BAD, about, what, next_step)


def of_error(about: str, error: LmkvError) -> Finding:
    """An error of ours, which knows the next step."""
    return bad(about, error.what, error.next_step)
