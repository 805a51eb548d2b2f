"""Stretches of characters → which tokens are learned.

A token is learned if any of its characters is: where one token spans the end of a prompt and the start of an answer, it
belongs to the answer, because the prompt alone would not give it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

Span = tuple[int, int]
Places = NDArray[np.int64]
"""Where tokens begin and end in a text, by characters: [tokens, 2]."""
Flags = NDArray[np.bool_]
"""One for each token."""


def places_of(offsets: Sequence[Span]) -> Places:
    """A tokenizer's offsets as an array."""
    return np.array(offsets, np.int64).reshape(-1, 2)


def places_in(encoding: Encoding, length: int) -> Places:
    """Where the tokens of a text of so many characters stand in it, as a tokenizer says.

    With the spaces that `trim_offsets` takes from a token's end, which would otherwise go to the next one, whatever
    that is. Those from a token's front are left to `extents`.
    """
    places, tokens = places_of(encoding.offsets), encoding.tokens
    for i in [i for i, token in enumerate(tokens) if token[-1:] == "Ġ" or token[-1:].isspace()]:
        trimmed = len(tokens[i]) - len(tokens[i].replace("Ġ", " ").rstrip())
        # A token of spaces alone keeps its end; only the first of a text gets no place: it may have been put there.
        if trimmed < len(tokens[i]) or not places[i].any():
            is_last = i + 1 == len(places) or not places[i + 1].any()  # but for EOS
            bound = length if is_last else int(places[i + 1, 0])
            places[i, 1] = max(places[i, 1], min(places[i, 1] + trimmed, bound))
    return places


def are_sound(offsets: Places, text: str) -> bool:
    """Whether character offsets run through the text in order, to its end. Some tokenizers give none, or wrong ones."""
    placed = offsets[offsets.any(axis=1)]  # (0, 0): a token that is not in the text, such as BOS
    in_order = bool((placed[1:] >= placed[:-1]).all())
    return in_order and (int(placed[-1, 1]) if len(placed) else 0) >= len(text.rstrip())


def extents(offsets: Places) -> Places:
    """Sound offsets with the spaces that byte-level tokenizers trim off a token's front (`trim_offsets`) put back."""
    ends = np.maximum.accumulate(offsets[:, 1])
    starts = offsets[:, 0].copy()
    starts[:1], starts[1:] = np.minimum(starts[:1], 0), np.minimum(starts[1:], ends[:-1])
    return np.stack([np.maximum.accumulate(starts), ends], axis=1)


def learned_by_extent(spans: Sequence[Span], places: Places) -> Flags:
    """For each token, given by its extent, whether one of the spans touches it."""
    bounds = np.array(spans, np.int64).reshape(-1, 2)
    first = np.searchsorted(places[:, 1], bounds[:, 0], "right")
    last = np.searchsorted(places[:, 0], bounds[:, 1], "left")
    return _flags(len(places), zip(first.tolist(), last.tolist(), strict=True))


def straddles(spans: Sequence[Span], places: Places) -> bool:
    """Whether a token begins before one of the spans and ends inside it."""
    begins = np.array([start for start, _ in spans], np.int64)
    tokens = np.searchsorted(places[:, 1], begins, "right")
    inside = tokens < len(places)
    return bool((places[tokens[inside], 0] < begins[inside]).any())


def learned_by_prefix(
    spans: Sequence[Span], text: str, ids: Sequence[int], encode: Callable[[str], Sequence[int]]
) -> Flags:
    """The same for tokenizers without offsets: a span begins where tokenising only what precedes it gives other ids."""

    def border(position: int) -> int:
        return len(ids) if position == len(text) else agreement(encode(text[:position]), ids)

    return _flags(len(ids), [(border(start), border(end)) for start, end in spans])


def agreement(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items at the beginning of two sequences are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _flags(length: int, stretches: Iterable[tuple[int, int]]) -> Flags:
    flags = np.zeros(length, np.bool_)
    for first, last in stretches:
        flags[first:last] = True
    return flags
