"""A value of a configuration as a text: equal values, and only those, have equal texts.

The text is the same in every process and on every host: mappings and sets are sorted whatever their
keys are, and nothing in it is an address. Objects of classes that are not known here (code that
comes with a model defines its own) are what pickle would restore them from.
"""

from __future__ import annotations

import copyreg
import enum
import json
import types
from collections.abc import Mapping, Set
from pathlib import PurePath
from typing import Any

from lmkv_ray.errors import UnsupportedError

MAX_DEPTH = 64
"""Values that lie deeper refer to themselves."""

_TORCH_CONSTANTS = frozenset({"dtype", "device", "layout", "memory_format"})


def canonical(value: Any, name: str) -> str:
    """The text of a value.

    Args:
        value: any value that a configuration holds.
        name: what the value is called, for errors.

    Raises:
        UnsupportedError: the value, or a part of it, cannot be read; names the part.
    """
    return _text(value, name, 0)


def _text(value: Any, name: str, depth: int) -> str:
    if depth > MAX_DEPTH:
        raise _refusal(name, "refers to itself, or is nested too deep")
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, enum.Enum):
        return f"{_class(value)}.{value.name}"
    if isinstance(value, str):
        return json.dumps(str(value))
    if isinstance(value, int | float | complex):
        return repr(value) if type(value).__module__ == "builtins" else _plain(value, name, depth)
    if isinstance(value, bytes | bytearray):
        return f"bytes {bytes(value).hex()}"
    if isinstance(value, PurePath):
        return json.dumps(str(value))
    if isinstance(value, Mapping):
        items = (
            (_text(key, f"a key of {name}", depth + 1), key, item) for key, item in value.items()
        )
        texts = sorted(f"{text}: {_text(v, f'{name}.{key}', depth + 1)}" for text, key, v in items)
        return f"{{{', '.join(texts)}}}"
    if isinstance(value, list | tuple):
        texts = [_text(v, f"{name}[{i}]", depth + 1) for i, v in enumerate(value)]
        return f"[{', '.join(texts)}]"
    if isinstance(value, Set):
        return f"<{', '.join(sorted(_text(v, f'an item of {name}', depth + 1) for v in value))}>"
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        if "<" in value.__qualname__:
            raise _refusal(name, "is a function without a name of its own")
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__ == "torch" and type(value).__name__ in _TORCH_CONSTANTS:
        return str(value)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # arrays, tensors, scalars of NumPy
        return f"{value.dtype} {_plain(value, name, depth)}"
    return _pickled(value, name, depth)


def _plain(value: Any, name: str, depth: int) -> str:
    plain = value.tolist() if hasattr(value, "tolist") else value
    return repr(plain) if plain is value else _text(plain, name, depth + 1)


def _pickled(value: Any, name: str, depth: int) -> str:
    """An object, by all that pickle would keep of it."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        kept = reduce(value) if reduce is not None else value.__reduce_ex__(2)
    except Exception as error:
        raise _refusal(name, f"cannot be read ({error})") from error
    if isinstance(kept, str):
        return f"{type(value).__module__}.{kept}"
    maker, arguments, *rest = kept
    state, items, pairs = (*rest, None, None, None)[:3]
    if items is not None:
        items = list(items)
    if pairs is not None:
        pairs = dict(pairs)
    parts = [maker, arguments, state, items, pairs]
    return f"{_class(value)}({_text(parts, name, depth + 1)})"


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _refusal(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"lmkv_ray must know all that decides the KV of a model, but {name} {why}.",
        next_step="Make it a plain value (numbers, texts, lists, mappings) in the model's "
        "configuration, or serve this model without lmkv_ray.",
    )
