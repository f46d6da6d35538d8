"""Whose a chunk is: its *space*, a namespace and a tenant in it.

A tenant is all requests of one namespace with one ``cache_salt``; requests without one are a tenant
too. A space has 8 bytes: the upper half is the beginning of the namespace's digest, the lower half
a digest of the salt, and neither is 0. A half that is 0 means all: a space without a tenant is a
whole namespace, one without a namespace is a salt wherever it was used.

Spaces decide nothing about bytes: keys do, of which namespace and salt are a part, in full. What a
collision of 4 bytes costs is that two tenants have one share, one encryption key and one clear.
"""

from __future__ import annotations

from hashlib import blake2b

from lmkv_ray.errors import ConfigError

_HALF = 32
_TENANT = (1 << _HALF) - 1
_NAMESPACE = _TENANT << _HALF


def space_of(namespace: bytes) -> int:
    """A whole namespace, from its digest (see ``keys.Namespace``)."""
    return (int.from_bytes(namespace[:4], "little") or 1) << _HALF


def tenant_of(salt: str) -> int:
    """A salt in all namespaces; any text, none is empty."""
    digest = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=4, person=b"lmkv tenant")
    return int.from_bytes(digest.digest(), "little") or 1


def clear_bytes(namespace: str = "", salt: str | None = None) -> bytes:
    """What a clear names (see ``messages.Clear``).

    Args:
        namespace: its digest in hex, or the first 8 digits or more, as engines log it; empty: all.
        salt: empty: requests without one; None: all.

    Raises:
        ConfigError: this is no namespace.
    """
    if not namespace and salt is None:
        return b""
    try:
        digest = bytes.fromhex(namespace)
    except ValueError:
        digest = b"?"
    if namespace and len(digest) < _HALF // 8:
        raise ConfigError(
            f"{namespace!r} is no namespace.",
            next_step="give the hex digits that the engine's log names ('lmkv_ray: age ..., "
            "namespace ...'), 8 or more.",
        )
    space = (space_of(digest) if namespace else 0) | (tenant_of(salt) if salt is not None else 0)
    return space.to_bytes(8, "little")


def namespace_of(space: int) -> int:
    """The whole namespace of a tenant."""
    return space & _NAMESPACE


def tenant_within(space: int, given: int) -> int:
    """The space of a chunk, as given by an engine that may only name tenants of ``space``."""
    return given if 0 < given <= _NAMESPACE | _TENANT and covers(space, given) else space


def covers(which: int | None, space: int) -> bool:
    """Whether a clear of ``which`` (None: everything) is one of this space too."""
    return which is None or which in _covering(space)


def covering(space: int) -> tuple[int | None, ...]:
    """All that covers a space: everything, its namespace, its tenant, itself; each once."""
    return (None, *_covering(space))


def overlap(one: int | None, other: int) -> bool:
    """Whether there may be chunks of both."""
    if one is None or not one or not other:
        return one is None
    halves = ((one & half, other & half) for half in (_NAMESPACE, _TENANT))
    return all(a == b or not a or not b for a, b in halves)


def _covering(space: int) -> tuple[int, ...]:
    wide = {space & _NAMESPACE, space & _TENANT, space}
    return tuple(sorted(wide - {0}))
