"""Scores that were made of merge ranks, back into the merges: for a vocabulary without model file.

``spm_json`` scores a merged token with minus its best rank, any other with minus the number of
merged tokens and its id. So ranks are in the scores; where several pairs made a token, the ranks
after its best one are free up to the next token's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .vocabulary import TokenType

_MARKED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)

Pieces = Sequence[tuple[str, float, int]]


def ranked_merges(pieces: Pieces) -> list[tuple[str, str]] | None:
    """Return merges in which every token has its rank; None when the scores are no ranks.

    Args:
        pieces: text, score and type per id.
    """
    normal = [n for n, (_, _, kind) in enumerate(pieces) if kind == TokenType.NORMAL]
    counts = {-pieces[n][1] - n for n in normal if len(pieces[n][0]) == 1}
    if len(counts) != 1:
        return None
    count = int(counts.pop())
    ids = {text: n for n, (text, _, _) in enumerate(pieces)}
    merged = {
        int(-pieces[n][1]): n
        for n in normal
        # a rank may happen to be what a token without one would have
        if -pieces[n][1] != count + n or next(_pairs(pieces[n][0], ids), None)
    }
    # tokens that were marked later (special ones, a user's own) have a rank, but no score that says
    made = [list(_pairs(p[0], ids)) for p in pieces if p[2] in _MARKED]
    hidden = [pairs for pairs in made if pairs][: count - len(merged)]
    if len(merged) + len(hidden) != count or any(rank < 0 for rank in merged):
        return None
    out: list[tuple[str, str]] = []
    spare = [pair for pairs in hidden for pair in pairs]
    ranks = sorted(merged)
    if ranks and ranks[0] > 0:
        if ranks[0] > len(spare):
            return None
        out = [spare.pop(0) for _ in range(ranks[0])]
    for rank, after in zip(ranks, [*ranks[1:], None], strict=True):
        pairs = list(_pairs(pieces[merged[rank]][0], ids))
        room = len(pairs) if after is None else after - rank
        out += pairs[:room]
        spare += pairs[room:]
        missing = max(0, room - len(pairs))
        if not pairs or len(out) != rank + room - missing or missing > len(spare):
            return None
        out += [spare.pop(0) for _ in range(missing)]
    return out + spare


def _pairs(text: str, ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the pairs that make a token, by the ids of their parts."""
    cuts = ((text[:k], text[k:]) for k in range(1, len(text)))
    yield from sorted(
        ((a, b) for a, b in cuts if a in ids and b in ids), key=lambda p: (ids[p[0]], ids[p[1]])
    )
