"""Stretches of characters → which tokens are learned.

A token is learned if any of its characters is: where one token spans the end of a prompt and the start of an answer, it
belongs to the answer, because the prompt alone would not give it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

Span = tuple[int, int]


def are_sound(offsets: Sequence[Span], text: str) -> bool:
    """Whether character offsets run through the text in order, to its end. Some tokenizers give none, or wrong ones."""
    placed = [place for place in offsets if place != (0, 0)]  # (0, 0): a token that is not in the text, such as BOS
    in_order = all(place[0] <= following[0] and place[1] <= following[1] for place, following in pairwise(placed))
    return in_order and (placed[-1][1] if placed else 0) >= len(text.rstrip())


def extents(offsets: Sequence[Span]) -> list[Span]:
    """Sound offsets with the spaces that byte-level tokenizers trim off a token's front (`trim_offsets`) put back."""
    ends = list(accumulate((end for _, end in offsets), max))
    starts = (min(start, before) for (start, _), before in zip(offsets, [0, *ends], strict=False))
    return list(zip(accumulate(starts, max), ends, strict=True))


def learned_by_extent(spans: Sequence[Span], places: Sequence[Span]) -> list[bool]:
    """For each token, given by its extent, whether one of the spans touches it."""
    starts, ends = [start for start, _ in places], [end for _, end in places]
    return _flags(len(places), [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans])


def straddles(spans: Sequence[Span], places: Sequence[Span]) -> bool:
    """Whether a token begins before one of the spans and ends inside it."""
    ends = [end for _, end in places]
    reaching = ((start, bisect_right(ends, start)) for start, _ in spans)
    return any(token < len(places) and places[token][0] < start for start, token in reaching)


def learned_by_prefix(
    spans: Sequence[Span], text: str, ids: Sequence[int], encode: Callable[[str], Sequence[int]]
) -> list[bool]:
    """The same for tokenizers without offsets: a span begins where tokenising only what precedes it gives other ids."""

    def border(position: int) -> int:
        return len(ids) if position == len(text) else agreement(encode(text[:position]), ids)

    return _flags(len(ids), [(border(start), border(end)) for start, end in spans])


def agreement(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items at the beginning of two sequences are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _flags(length: int, stretches: Sequence[tuple[int, int]]) -> list[bool]:
    flags = [False] * length
    for first, last in stretches:
        flags[first:last] = [True] * max(last - first, 0)
    return flags
