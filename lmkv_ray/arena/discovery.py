"""The arena of this host, found without asking a service.

A worker of an engine learns which arena is its own with its first step. Whatever takes long with an
arena (a GPU registers it) should be over by then, so it is guessed before.
"""

from __future__ import annotations

from pathlib import Path

from lmkv_ray.arena.owners import is_alive
from lmkv_ray.arena.reader import ArenaReader
from lmkv_ray.arena.segment import DEFAULT_DIRECTORY, Segment
from lmkv_ray.errors import ArenaError


def find_arena(family: str, directory: Path = DEFAULT_DIRECTORY) -> ArenaReader | None:
    """The one arena named ``family.x`` whose writer lives.

    Returns:
        None if there is none, or several: which of them an engine will be given is not known.
    """
    living = []
    for path in Segment.find(family, directory, below=True):
        try:
            reader = ArenaReader.attach(path)
        except ArenaError:  # gone meanwhile, or of another version
            continue
        if is_alive(reader.writer):
            living.append(reader)
        else:
            reader.close()
    if len(living) == 1:
        return living[0]
    for reader in living:
        reader.close()
    return None
