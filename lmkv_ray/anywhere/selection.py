"""Which matches are used, and which are computed again although they are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lmkv_ray.anywhere.matches import Match


def within_spans(
    matches: Sequence[Match], spans: Sequence[tuple[int, int]], chunk_tokens: int
) -> tuple[list[Match], list[int]]:
    """Matches cut at the borders of documents that a client named.

    Args:
        matches: ascending.
        spans: (begin, end) of each document in tokens of the prompt, ascending.
        chunk_tokens: tokens of a stored chunk.

    Returns:
        what of the matches lies in a span, and the number of the span of each.
    """
    cut, numbers = [], []
    for match in matches:
        for number, (begin, end) in enumerate(spans):
            first, last = max(begin, match.dst), min(end, match.dst + match.n)
            if first < last:
                lead = match.lead + first - match.dst
                skipped, upto = lead // chunk_tokens, -(-(lead + last - first) // chunk_tokens)
                cut.append(
                    replace(
                        match,
                        dst=first,
                        n=last - first,
                        chunks=match.chunks[skipped:upto],
                        lead=lead - skipped * chunk_tokens,
                    )
                )
                numbers.append(number)
    return cut, numbers


def best_match(matches: Sequence[Match], tokens: Sequence[int]) -> int | None:
    """Number of the match that shares most with the text behind the last one: the question.

    A token counts the less, the more matches it stands in. None: nothing is shared.
    """
    if not matches:
        return None
    question = set(tokens[matches[-1].dst + matches[-1].n :])
    texts = [question & set(tokens[m.dst : m.dst + m.n]) for m in matches]
    spread = Counter(token for text in texts for token in text)
    scores = [sum(1 / spread[token] for token in text) for text in texts]
    best = max(range(len(matches)), key=scores.__getitem__)
    return best if scores[best] > 0 else None
