"""Names of blocks that are put together: never those of the same text computed from its beginning.

The engine finds blocks by hashes that are chained: each is of its parent, its tokens and what else
decides its bytes. From the block of the first copied token on, the hash is one of ours: of the same
things, and of which stored tokens lie where in the block. All later blocks, also of generated
tokens, are chained to it. So no exact prefix ever finds such a block, whatever looks for it, and a
prompt that is put together in the same way does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256

import msgspec

from lmkv_ray.anywhere.plan import Piece, Plan

_KIND = "lmkv-anywhere-1"


def first_named(plan: Plan, block: int) -> int:
    """Number of the first block that has a name of ours: those before it are exact.

    Args:
        plan: what is reused and recomputed of the request.
        block: tokens between two hashes of the engine.
    """
    return plan.pieces[0].dst // block


def names(
    plan: Plan, hashes: Sequence[bytes], tokens: Sequence[int], block: int, tenant: Sequence[str]
) -> list[bytes]:
    """Names of the whole blocks from ``first_named`` to that of the last copied token.

    Args:
        plan: what is reused and recomputed of the request.
        hashes: of the engine, of the exact blocks before (and maybe more).
        tokens: the token ids of the prompt.
        block: tokens between two hashes.
        tenant: names of adapter and salt, which the engine puts into its own hashes.

    Returns:
        32 bytes each.
    """
    first, end = first_named(plan, block), min(-(-plan.resume // block), len(tokens) // block)
    parent, made = hashes[first - 1] if first else b"", []
    for number in range(first, end):
        begin = number * block
        laid = list(_laid(plan, begin, begin + block))
        content = (_KIND, parent, list(tokens[begin : begin + block]), list(tenant), laid)
        parent = sha256(msgspec.msgpack.encode(content)).digest()
        made.append(parent)
    return made


def _laid(plan: Plan, begin: int, end: int) -> Iterator[tuple[int, int, bytes, int]]:
    """What is copied into a block: to where in it, how many tokens, of which chunk, from where."""
    for piece in plan.pieces:
        if piece.dst < end and piece.end > begin:
            yield from _of_chunks(piece, max(piece.dst, begin), min(piece.end, end), begin, plan)


def _of_chunks(
    piece: Piece, at: int, end: int, begin: int, plan: Plan
) -> Iterator[tuple[int, int, bytes, int]]:
    while at < end:
        offset = piece.lead + at - piece.dst
        chunk, inside = divmod(offset, plan.chunk_tokens)
        n = min(end - at, plan.chunk_tokens - inside)
        yield at - begin, n, piece.chunks[chunk].key, inside
        at += n
