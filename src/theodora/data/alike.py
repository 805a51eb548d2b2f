"""Rows to evaluate on that are nearly rows to train on: of them the loss tells what was learned by heart.

A row is the set of its triples of words. Measured is containment: how many of a held-out row's triples stand in one and
the same training row (Broder 1997, "On the resemblance and containment of documents"; there by sketches, here exactly:
held-out rows are few, so that one look at each training row is enough). Triples that many rows have, a shared
instruction, a template, do not count: what is left is a row's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from theodora.data.examples import Examples

ALIKE = 0.8
"""Share of a row's own triples from which on it is called a near copy: of 50 words some three may differ."""
_MOST_TRAINING, _MOST_HELD_OUT, _MOST_TEXT = 50_000, 2_000, 20_000  # rows, rows, characters of a row
_SHARED_BY = 20  # rows: triples of more are a template's
_FEWEST_OWN = 6  # triples: fewer say nothing
_AT_ONCE = 100  # rows, so that what is made of them stays in the processor's cache
_UNSAID = {"role", "name", "type", "tool_call_id", "id", "weight"}  # of turns: what is no text of theirs
_FILTER_BITS = 22

# Words become numbers by tables drawn once: a byte's, times that of its place in the word.
_drawn = np.random.Generator(np.random.PCG64(0))
_BYTE = _drawn.integers(1 << 63, size=256, dtype=np.uint64) * 2 + 1
_PLACE = _drawn.integers(1 << 63, size=64, dtype=np.uint64) * 2 + 1
_FIRST, _SECOND, _THIRD = (int(n) for n in _drawn.integers(1 << 63, size=3, dtype=np.uint64) * 2 + 1)
_APART, _LETTER, _SYMBOL, _LEAD, _FOLLOWS = range(5)
_KINDS = np.full(256, _SYMBOL, np.uint8)
_KINDS[: ord("!")] = _APART
_KINDS[list(b".,;:!?\"'`")] = _APART
_KINDS[list(b"abcdefghijklmnopqrstuvwxyz0123456789_")] = _LETTER
_KINDS[0x80:0xC0] = _FOLLOWS
_KINDS[0xC0:0xE0] = _LETTER  # the first byte of two: Latin, Greek, Cyrillic, Hebrew, Arabic
_KINDS[0xE0:] = _LEAD  # of three and four: scripts of which many write no spaces, so each character is a word


@dataclass(frozen=True)
class NearCopy:
    """A held-out row that is nearly a training row."""

    row: int
    """Its place among the held-out rows, or in the source, from 0."""
    of: int
    """The place of the training row that is nearest, likewise."""
    share: float
    """Of its own triples of words, how many stand there; 1.0 also of rows that are the same."""


@dataclass(frozen=True)
class NearCopies:
    """What was found, the nearest first."""

    found: tuple[NearCopy, ...]
    held_out: int
    """Rows that were looked at."""
    training: int
    """Likewise."""


def near_copies(
    training: Examples,
    held_out: Examples,
    places: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> NearCopies:
    """Find held-out rows that are nearly training rows.

    Looked at are up to 50,000 training rows and 2,000 held-out ones, at even distances, and the first 20,000 characters
    of each. Case, white space and marks between words do not count. Of prompts whose completions are the model's
    own, the prompts alone are compared.

    Args:
        training: rows to train on.
        held_out: rows to evaluate on.
        places: of the training rows and of the held-out ones in their source, if they are to be named by these.
    """
    asked_for, looked_at = _spread(len(held_out), _MOST_HELD_OUT), _spread(len(training), _MOST_TRAINING)
    if not len(asked_for) or not len(looked_at):
        return NearCopies((), len(asked_for), len(looked_at))
    shared_by = max(2, min(_SHARED_BY, (len(asked_for) + len(looked_at)) // 10))
    asked = _Asked(_numbers(held_out.dataset, asked_for), len(asked_for), shared_by)
    first = 0
    for numbers in _numbers(training.dataset, looked_at):
        asked.look(numbers, first)
        first += len(numbers[0])
    if places is not None:
        looked_at, asked_for = places[0][looked_at], places[1][asked_for]
    found = [
        NearCopy(int(asked_for[row]), int(looked_at[of]), share) for row, of, share in asked.nearest() if share >= ALIKE
    ]
    return NearCopies(tuple(sorted(found, key=lambda copy: -copy.share)), len(asked_for), len(looked_at))


def told(copies: NearCopies, of: Sequence[str], totals: tuple[int, int], most: int = 3) -> str:
    """A sentence on them; empty where there are none.

    Args:
        copies: that were found.
        of: what the held-out rows and the training rows are called, after "row 12".
        totals: how many held-out rows and training rows there are.
        most: near copies that are named.
    """
    if not copies.found:
        return ""
    named = [f"row {each.row + 1:,}{of[0]} is {each.share:.0%} row {each.of + 1:,}{of[1]}" for each in copies.found]
    count = len(copies.found)
    looked = [(copies.held_out, totals[0], "held-out"), (copies.training, totals[1], "training")]
    parts = [f"{seen:,} of {total:,} {kind} rows" for seen, total, kind in looked if seen < total]
    return (
        f"near copies: {count:,} of {copies.held_out:,} held-out rows {'is' if count == 1 else 'are'} nearly in what "
        f"is trained on, so their loss is too good ({'; '.join(named[:most])}{'; …' if count > most else ''})"
        + (f"; looked at {' and '.join(parts)}" if parts else "")
    )


def _spread(total: int, most: int) -> NDArray[np.int64]:
    count = min(total, most)
    return np.arange(count) * total // max(count, 1)


_Numbers = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint64]]
"""A number for each row as a whole; and for each triple its row, and its number."""


def _numbers(rows: Dataset, places: NDArray[np.int64]) -> Iterator[_Numbers]:
    kept = rows.select(places) if len(places) < len(rows) else rows
    if "columns" in kept.column_names:  # prompts: `data.examples`
        kept = kept.select_columns(["prompt"])
    elif "tools" in kept.column_names:
        kept = kept.remove_columns("tools")
    table: Any
    for table in kept.with_format("arrow").iter(_AT_ONCE):
        yield _triples([" ".join(_texts(row))[:_MOST_TEXT] for row in table.to_pylist()])


def _texts(value: Any) -> Iterator[str]:
    """What a cell says, however deep; turns are stored as JSON."""
    if isinstance(value, str):
        if value.startswith("{") and value.endswith("}"):
            try:
                yield from _texts(json.loads(value))
                return
            except (ValueError, RecursionError):
                pass
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _UNSAID:
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _triples(texts: Sequence[str]) -> _Numbers:
    words, rows = _words(texts)
    count = len(texts)
    starts = np.searchsorted(rows, np.arange(count))
    place = np.arange(len(words)) - starts[rows]
    hashes = np.zeros(count, np.uint64)
    np.add.at(hashes, rows, words * (2 * place + 1).astype(np.uint64))
    if len(words) < 3:
        return hashes, np.zeros(0, np.int64), np.zeros(0, np.uint64)
    triples = words[:-2] * np.uint64(_FIRST) + words[1:-1] * np.uint64(_SECOND) + words[2:] * np.uint64(_THIRD)
    within = rows[:-2] == rows[2:]
    return hashes, rows[:-2][within], triples[within]


def _words(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """A number for each word, (words,), and whose row it is."""
    parts = [text.casefold().encode("utf-8", "replace").replace(b"\0", b" ") for text in texts]
    data = np.frombuffer(b"\0".join(parts) + b"\0\0", np.uint8)
    kinds = _KINDS[data]
    quotes = np.flatnonzero((data[:-2] == 0xE2) & (data[1:-1] == 0x80))  # “ ” ‘ ’ — …
    for behind in range(3):
        kinds[quotes + behind] = _APART
    before = np.concatenate([[np.uint8(0)], data[:-1]])
    letters = (kinds == _LETTER) | ((kinds == _FOLLOWS) & (before >= 0xC0) & (before < 0xE0))
    begins = (kinds == _SYMBOL) | (kinds == _LEAD)
    begins[0] |= letters[0]
    begins[1:] |= letters[1:] & ~letters[:-1]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    place = np.arange(len(data)) - starts[np.maximum(np.cumsum(begins) - 1, 0)]
    values = np.where(kinds == _APART, np.uint64(0), _BYTE[data] * _PLACE[place & 63])
    ends = np.cumsum([len(part) + 1 for part in parts])
    return np.add.reduceat(values, starts), np.searchsorted(ends, starts, "right")


class _Asked:
    """The held-out rows' triples, and which training rows have them.

    Args:
        numbers: of the held-out rows.
        count: of them.
        shared_by: rows that may have a triple that still counts.
    """

    def __init__(self, numbers: Iterator[_Numbers], count: int, shared_by: int) -> None:
        hashes, rows, triples, first = [], [], [], 0
        for some, of, found in numbers:
            hashes.append(some)
            rows.append(of + first)
            triples.append(found)
            first += len(some)
        self._hashes = np.concatenate(hashes)
        self._triples, number = np.unique(np.concatenate(triples), return_inverse=True)
        row, self._number = _distinct(np.concatenate(rows), number, len(self._triples))
        self._bounds = np.searchsorted(row, np.arange(count + 1))
        # In how many rows each is; rows of the same words count once.
        _, kept = np.unique(self._hashes, return_index=True)
        self._in_rows = np.bincount(self._number[np.isin(row, kept)], minlength=len(self._triples))
        self._shared_by = shared_by
        self._maybe = np.zeros(1 << _FILTER_BITS, bool)  # most triples of training rows are no held-out row's
        self._maybe[self._triples >> np.uint64(64 - _FILTER_BITS)] = True
        self._seen: set[int] = set()
        self._same: dict[int, int] = {}
        self._hits: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def look(self, numbers: _Numbers, first: int) -> None:
        """Take training rows in, of which the first is the `first`."""
        hashes, rows, triples = numbers
        new = np.ones(len(hashes), bool)
        for at, value in enumerate(hashes.tolist()):
            if value in self._seen:
                new[at] = False
            else:
                self._seen.add(value)
                self._same[value] = first + at
        maybe = np.flatnonzero(self._maybe[triples >> np.uint64(64 - _FILTER_BITS)] & new[rows])
        if not len(maybe) or not len(self._triples):
            return
        wanted = triples[maybe]
        number = np.minimum(np.searchsorted(self._triples, wanted), len(self._triples) - 1)
        known = (self._triples[number] == wanted) & (self._in_rows[number] <= self._shared_by)
        row, number = _distinct(rows[maybe][known], number[known], len(self._triples))
        self._in_rows += np.bincount(number, minlength=len(self._in_rows))
        self._hits.append((row + first, number))

    def nearest(self) -> Iterator[tuple[int, int, float]]:
        """Of each held-out row the training row that has most of it, and the share; of rows of their own alone."""
        row = np.concatenate([each for each, _ in self._hits]) if self._hits else np.zeros(0, np.int64)
        number = np.concatenate([each for _, each in self._hits]) if self._hits else np.zeros(0, np.int64)
        order = np.argsort(number, kind="stable")
        row, bounds = row[order], np.searchsorted(number[order], np.arange(len(self._triples) + 1))
        for at, value in enumerate(self._hashes.tolist()):
            if value in self._same and value:  # (nothing but marks has no words)
                yield at, self._same[value], 1.0
                continue
            numbers = self._number[self._bounds[at] : self._bounds[at + 1]]
            own = numbers[self._in_rows[numbers] <= self._shared_by]
            if len(own) < _FEWEST_OWN:
                continue
            there = np.concatenate([row[bounds[each] : bounds[each + 1]] for each in own])
            if len(there):
                candidates, counts = np.unique(there, return_counts=True)
                best = int(np.argmax(counts))
                yield at, int(candidates[best]), float(counts[best] / len(own))


def _distinct(
    rows: NDArray[np.int64], numbers: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of a row and a number, each once, in order."""
    pairs = np.unique(rows * max(count, 1) + numbers)
    return pairs // max(count, 1), pairs % max(count, 1)
