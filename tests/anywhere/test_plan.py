"""Plans tile a prompt, keep their limits, and know where each copied token is stored."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.anywhere.matches import Match, StoredChunk
from lmkv_ray.anywhere.names import first_named, names
from lmkv_ray.anywhere.plan import Plan, PlanLimits, plan

CHUNK = 32


def match(dst: int, n: int, stored: int, donor: int = 0, lone: bool = False) -> Match:
    """Tokens from ``dst`` on are stored from position ``stored`` on, in chunks of a donor."""
    first, last = stored // CHUNK, -(-(stored + n) // CHUNK)
    chunks = tuple(
        StoredChunk(donor * 1000 + i, 2, bytes([donor]) * 8 + i.to_bytes(8, "big"), i * CHUNK)
        for i in range(first, last)
    )
    return Match(dst, n, chunks, stored - first * CHUNK, dst - stored, lone)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[Match]]:
    """Length of a prompt and matches in it."""
    at, found = 0, []
    for donor in range(draw(st.integers(0, 6))):
        at += draw(st.integers(0, 60))
        n = draw(st.integers(1, 150))
        found.append(match(at, n, draw(st.integers(0, 500)), donor))
        at += n
    return at + draw(st.integers(1, 50)), found


LIMITS = st.builds(PlanLimits, st.integers(0, 5), st.integers(0, 300), st.integers(1, 40))


def sources(made: Plan, found: list[Match]) -> None:
    """Each copied token comes from where a match says that it is stored."""
    stored = {}
    for its in found:
        for i in range(its.n):
            chunk, inside = divmod(its.lead + i, CHUNK)
            stored[its.dst + i] = its.chunks[chunk].key, inside, its.delta
    for piece in made.pieces:
        assert 0 <= piece.lead < CHUNK
        assert len(piece.chunks) == -(-(piece.lead + piece.n) // CHUNK)
        for i in range(piece.n):
            chunk, inside = divmod(piece.lead + i, CHUNK)
            position = piece.chunks[chunk].first + inside
            assert stored[piece.dst + i] == (piece.chunks[chunk].key, inside, piece.delta)
            assert piece.dst + i - position == piece.delta


def tiles(made: Plan) -> None:
    parts = sorted([*made.holes, *((p.dst, p.end) for p in made.pieces)])
    assert parts[0][0] == made.exact
    assert parts[-1][1] == made.resume == made.pieces[-1].end
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert all(begin < end for begin, end in parts)
    assert made.reused + made.recomputed == made.resume - made.exact


@given(prompts(), st.integers(0, 8), st.integers(0, 40), st.sets(st.integers(0, 5)), LIMITS)
def test_pieces_and_holes_tile_what_is_not_computed_as_usual(
    prompt: tuple[int, list[Match]], blocks: int, first: int, whole: set[int], limits: PlanLimits
) -> None:
    n, found = prompt
    exact = min(blocks * 32, n - 1)
    made = plan(exact, found, n=n, chunk_tokens=CHUNK, first=first, whole=whole, limits=limits)
    if made is None:
        return
    tiles(made)
    sources(made, [its for i, its in enumerate(found) if i not in whole])
    assert made.resume <= n - 1
    assert len(made.holes) <= limits.rows
    assert made.recomputed <= limits.tokens
    for piece in made.pieces:
        assert piece.n >= limits.piece
        [its] = [m for m in found if m.dst <= piece.dst and piece.end <= m.dst + m.n]
        assert piece.dst >= max(its.dst, exact) + first


@given(prompts(), st.integers(0, 600))
def test_with_more_or_less_in_front_it_is_the_same_plan_from_there_on(
    prompt: tuple[int, list[Match]], exact: int
) -> None:
    n, found = prompt
    made = plan(0, found, n=n, chunk_tokens=CHUNK)
    if made is None:
        return
    later = made.begin_at(exact)
    if later is None:
        assert exact >= made.resume
        return
    tiles(later)
    sources(later, found)
    assert (later.exact, later.resume) == (exact, made.resume)
    copied = {t for p in made.pieces for t in range(p.dst, p.end) if t >= exact}
    assert copied == {t for p in later.pieces for t in range(p.dst, p.end)}


def test_what_a_step_cannot_take_is_cut_off_at_the_end() -> None:
    found = [match(10, 50, 0, 1), match(70, 50, 0, 2), match(130, 50, 0, 3)]
    made = plan(0, found, n=300, chunk_tokens=CHUNK, limits=PlanLimits(rows=2))
    assert made is not None
    assert made.holes == ((0, 10), (60, 70))
    assert made.resume == 120
    made = plan(0, found, n=300, chunk_tokens=CHUNK, limits=PlanLimits(tokens=19))
    assert made is not None
    assert made.resume == 60
    assert plan(0, found, n=300, chunk_tokens=CHUNK, limits=PlanLimits(tokens=9)) is None


def test_a_short_match_joins_the_hole_around_it() -> None:
    found = [match(10, 50, 0, 1), match(70, 15, 0, 2), match(90, 50, 0, 3)]
    made = plan(0, found, n=300, chunk_tokens=CHUNK)
    assert made is not None
    assert made.holes == ((0, 10), (60, 90))


TENANT = ("", "")
HASHES = [bytes([i]) * 32 for i in range(10)]
TOKENS = list(range(300))


def test_names_say_what_lies_where() -> None:
    """A prompt put together in the same way has the same names; each difference changes them."""

    def named(*found: Match, first: int = 0, tenant: tuple[str, str] = TENANT) -> list[bytes]:
        made = plan(0, found, n=300, chunk_tokens=CHUNK, first=first)
        assert made is not None
        assert first_named(made, 32) == 1
        return names(made, HASHES, TOKENS, 32, tenant)

    one, two = match(40, 100, 17, 1), match(150, 60, 5, 2)
    usual = named(one, two)
    assert usual == named(one, two)
    assert len(usual) == 6
    assert all(len(name) == 32 for name in usual)
    others = [
        named(match(40, 100, 17, 3), two),
        named(match(40, 100, 49, 1), two),
        named(match(41, 99, 18, 1), two),
        named(one, two, first=1),
        named(one, two, tenant=("", "salt")),
        named(one, two, tenant=("adapter", "")),
    ]
    for other in others:
        assert not set(other) & set(usual)
    later = named(one, match(150, 60, 5, 3))
    assert later[:3] == usual[:3]
    assert not set(later[3:]) & set(usual)


def test_blocks_before_the_first_piece_keep_their_names() -> None:
    made = plan(32, [match(100, 100, 0, 1)], n=300, chunk_tokens=CHUNK)
    assert made is not None
    assert first_named(made, 32) == 3
    mine = names(made, HASHES, TOKENS, 32, TENANT)
    assert mine != names(made, HASHES[::-1], TOKENS, 32, TENANT), "chained to what is before"
    assert len(mine) == 4


def test_a_prompt_that_ends_in_a_block_names_whole_blocks_only() -> None:
    made = plan(0, [match(0, 299, 7, 1)], n=300, chunk_tokens=CHUNK)
    assert made is not None
    assert len(names(made, [], TOKENS, 32, TENANT)) == 300 // 32
