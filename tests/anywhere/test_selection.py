"""Which matches are used, and which are computed again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.anywhere.matches import Match
from lmkv_ray.anywhere.selection import best_match, within_spans
from tests.anywhere.test_plan import CHUNK, match, prompts


@given(prompts(), st.lists(st.tuples(st.integers(0, 800), st.integers(1, 200)), max_size=5))
def test_what_is_cut_at_borders_is_stored_where_it_was(
    prompt: tuple[int, list[Match]], lengths: list[tuple[int, int]]
) -> None:
    spans, at = [], 0
    for gap, n in lengths:
        spans.append((at + gap, at + gap + n))
        at += gap + n
    _, found = prompt
    cut, numbers = within_spans(found, spans, CHUNK)
    tokens = {
        m.dst + i: (m.chunks[(m.lead + i) // CHUNK].key, (m.lead + i) % CHUNK, m.delta)
        for m in found
        for i in range(m.n)
    }
    seen = {}
    for its, number in zip(cut, numbers, strict=True):
        assert spans[number][0] <= its.dst < its.dst + its.n <= spans[number][1]
        for i in range(its.n):
            chunk, inside = divmod(its.lead + i, CHUNK)
            seen[its.dst + i] = its.chunks[chunk].key, inside, its.delta
    inside_spans = {t for begin, end in spans for t in range(begin, end)}
    assert seen == {t: stored for t, stored in tokens.items() if t in inside_spans}


def test_the_best_match_shares_the_rarest_words_with_the_question() -> None:
    tokens = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 6, 9, 1, 2, 5]
    found = [match(0, 4, 0), match(4, 4, 0), match(8, 4, 0)]
    assert best_match(found, tokens) == 1
    assert best_match(found, [*tokens[:12], 99]) is None
    assert best_match([], tokens) is None
