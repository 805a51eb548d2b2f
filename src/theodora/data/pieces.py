"""Tokens of many texts, each different piece of which is tokenised once.

Most of a tokenizer's time goes into words that it has had before. Where `borders` proves that a text's tokens are those
of its pieces, these are looked up, and where a stretch of characters begins and ends follows from the pieces, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from unicodedata import is_normalized

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from theodora.data.borders import Borders, borders_of
from theodora.data.masks import Flags, Places, Span, extents, places_in

Tokens = NDArray[np.int32]
"""Ids, or labels."""
_Counts = NDArray[np.int64]

_MOST_PIECES, _MOST_CHARACTERS = 1 << 17, 1 << 23
"""To remember, at most: some 30 MB. Then all are forgotten; those that are used often soon come again."""
_LONGEST_PLACED = 200
"""Characters of a piece at most, for the places of its tokens to be remembered."""
_TOGETHER = 256
"""New pieces that are tokenised as one text."""
_PRICE = 20
"""A new piece costs as much as so many characters of a text that is tokenised whole."""
_PAUSE = 8
"""Batches that are tokenised whole after one in which that would have been cheaper."""
# White space to Python, but not to the regular expressions of tokenizers.
_NO_SPACES = "\x1c\x1d\x1e\x1f"
# What differs if a tokenizer is not as it was taken to be: each is tokenised whole, too, before any text is cut.
_PROBES = (
    " a  b\n c\n\nd \n\n  e\t f\r\n\r\ng\n/h ;\n/i\n\n ",
    "don't I'LL 12345 3.14 x=1;\n\n\n}\n\tif (a) {\n    b();\n    }\n",
    "é 日本 語\u3000か 🙂\u200d🙂 \u00a0\u2028 x\u2029\ny \x00 \x7f",
)


@dataclass(frozen=True)
class TokenisedTexts:
    """Texts of a batch one after another, as tokens."""

    ids: Tokens
    begins: _Counts
    """Where the tokens of each text begin, and where the last ends: [texts + 1]."""
    _text_begins: _Counts
    _pieces: Sequence[str]
    _piece_begins: _Counts
    _token_begins: _Counts
    """Where each piece begins by characters and by tokens, and where the last ends: [pieces + 1]."""
    _places: _PlacesWithin

    def learned(self, spans: Sequence[Sequence[Span]]) -> tuple[Flags, int]:
        """Which tokens the spans of each text touch, and in how many texts a token begins before a span, to end in it.

        A token is touched as by `masks.learned_by_extent` of the whole text.
        """
        bounds = np.array(
            [
                (begin + start, begin + end, text)
                for text, (begin, own) in enumerate(zip(self._text_begins.tolist(), spans, strict=False))
                for start, end in own
            ],
            np.int64,
        ).reshape(-1, 3)
        first, straddling = self._tokens_at(bounds[:, 0], is_end=False)
        last, _ = self._tokens_at(bounds[:, 1], is_end=True)
        changes = np.zeros(len(self.ids) + 1, np.int64)
        np.add.at(changes, first, 1)
        np.add.at(changes, np.maximum(first, last), -1)
        return np.cumsum(changes[:-1]) > 0, len({int(bounds[i, 2]) for i in straddling})

    def _tokens_at(self, places: _Counts, *, is_end: bool) -> tuple[_Counts, list[int]]:
        """The token at each place (the first behind it, if it is an end), and the numbers of places within tokens."""
        pieces = np.searchsorted(self._piece_begins, places, "right") - 1
        tokens = self._token_begins[pieces]
        straddling: list[int] = []
        for i in np.flatnonzero(self._piece_begins[pieces] != places).tolist():
            piece, within = int(pieces[i]), int(places[i] - self._piece_begins[pieces[i]])
            extent = self._places(self._pieces[piece])
            if is_end:
                tokens[i] += np.searchsorted(extent[:, 0], within, "left")
                continue
            token = int(np.searchsorted(extent[:, 1], within, "right"))
            tokens[i] += token
            if token < len(extent) and extent[token, 0] < within:
                straddling.append(i)
        return tokens, straddling


class _PlacesWithin:
    """Where the tokens of a piece stand in it."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._cached = lru_cache(maxsize=1 << 12)(self._read)

    def __call__(self, piece: str) -> Places:
        # Some texts are one piece (a sequence of bases): thousands of those would not fit into memory.
        return self._cached(piece) if len(piece) <= _LONGEST_PLACED else self._read(piece)

    def _read(self, piece: str) -> Places:
        return extents(places_in(self._backend.encode(piece, add_special_tokens=False), len(piece)))


class _Numbers(dict[str, int]):
    """Pieces by number; what is asked for and not known gets the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, piece: str) -> int:
        number = self[piece] = len(self)
        self.new.append(piece)
        return number


class PieceTokenizer:
    """Tokenises texts by their pieces.

    Args:
        tokenizer: stays the caller's; its tokens must not change meanwhile.
        borders: of that tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, borders: Borders) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._borders = borders
        self._within = _PlacesWithin(self._backend)
        self._separator = borders.separator
        self._resting = 0
        self._forget()

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> PieceTokenizer | None:
        """One for a tokenizer; None where pieces might have other tokens than the whole."""
        borders = borders_of(tokenizer)
        if borders is None:
            return None
        probes = [*_PROBES, "".join(f"{token} x\n{token}y" for token in tokenizer.all_special_tokens)]
        # First, because this undoes what others left: padding, cutting, special tokens that are taken for words.
        whole = tokenizer(probes, add_special_tokens=False, verbose=False)["input_ids"]
        made = PieceTokenizer(tokenizer, borders)
        cut = made.encode(probes)
        same = cut is not None and [cut.ids[a:b].tolist() for a, b in pairwise(cut.begins.tolist())] == whole
        made._resting = 0
        return made if same else None

    @property
    def around(self) -> tuple[Sequence[int], Sequence[int]] | None:
        """The special tokens that the tokenizer puts before and behind a text; None if it may do more."""
        return self._borders.around

    def fits(self, text: str) -> bool:
        """Whether a text may be tokenised by its pieces."""
        if self._borders.normalizes and not is_normalized("NFC", text):
            return False
        return not any(character in text for character in _NO_SPACES)

    def encode(self, texts: Sequence[str]) -> TokenisedTexts | None:
        """The tokens of texts, as the tokenizer gives them without special tokens around; None if it has to do so.

        Args:
            texts: those that fit.
        """
        backend = self._backend
        if self._resting or backend.truncation or backend.padding or backend.encode_special_tokens:
            self._resting = max(self._resting - 1, 0)
            return None
        cut = [self._borders.cut(text) for text in texts]
        pieces = list(chain.from_iterable(cut))
        numbers = np.fromiter(map(self._numbers.__getitem__, pieces), np.int64, len(pieces))
        self._learn(sum(map(len, texts)))
        lengths, text_lengths = self._lengths[numbers], np.fromiter(map(len, texts), np.int64, len(texts))
        token_begins, piece_begins = _begins(lengths), _begins(self._sizes[numbers])
        of_pieces = _begins(np.fromiter(map(len, cut), np.int64, len(cut)))
        places = np.repeat(self._begins[numbers] - token_begins[:-1], lengths) + np.arange(token_begins[-1])
        ids = self._ids[places]
        if len(self._numbers) > _MOST_PIECES or self._characters > _MOST_CHARACTERS:
            self._forget()
        return TokenisedTexts(
            ids, token_begins[of_pieces], _begins(text_lengths), pieces, piece_begins, token_begins, self._within
        )

    def _learn(self, characters: int) -> None:
        """Tokenise the pieces that are new."""
        new, self._numbers.new = self._numbers.new, []
        if not new:
            return
        flat, lengths = self._tokens_of(new)
        self._begins = np.concatenate([self._begins, len(self._ids) + _begins(lengths)[:-1]])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, flat])
        sizes = np.fromiter(map(len, new), np.int64, len(new))
        self._sizes = np.concatenate([self._sizes, sizes])
        new_characters = int(sizes.sum())
        self._characters += new_characters
        if _PRICE * len(new) > characters - new_characters:
            self._resting = _PAUSE

    def _tokens_of(self, new: list[str]) -> tuple[Tokens, _Counts]:
        """The ids of pieces one after another, and how many each has."""
        if self._separator is not None:
            # A call for each piece takes longer than its tokens: many are one text, with a token between them.
            parts = [new[at : at + _TOGETHER] for at in range(0, len(new), _TOGETHER)]
            texts = [self._separator.join([*part, ""]) for part in parts]
            flat = np.concatenate([np.array(ids, np.int32) for ids in self._encoded(texts)])
            ends = np.flatnonzero(flat == self._ids[0])
            if len(ends) == len(new):  # or else a word is written as the separator is
                return np.delete(flat, ends), np.diff(ends, prepend=-1) - 1
        ids = self._encoded(new)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _forget(self) -> None:
        # Of each piece: where its ids begin, how many they are, and how many characters it has.
        self._begins, self._lengths, self._sizes = (np.zeros(0, np.int64) for _ in range(3))
        self._ids, self._numbers, self._characters = np.zeros(0, np.int32), _Numbers(), 0
        if self._separator is not None:
            # The first piece, so that no new one is the separator itself.
            self._numbers[self._separator] = 0
            self._ids = np.array([self._backend.token_to_id(self._separator)], np.int32)
            self._begins, self._lengths = np.zeros(1, np.int64), np.ones(1, np.int64)
            self._sizes = np.array([len(self._separator)])


def _begins(lengths: _Counts) -> _Counts:
    """Where each of some things begins that stand one after another, and where the last ends."""
    begins = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=begins[1:])
    return begins
