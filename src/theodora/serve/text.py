"""The text of an answer while its tokens arrive: whole characters only, up to a stop text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

BROKEN = "�"
"""What decoding gives for part of a character."""
_BYTES = 32  # tokens that may each be one byte of a character: no character has as many
CONTEXT = 5
"""Tokens before a token on which its text may depend: more than any decoder looks at."""


class Writer:
    """Turns the growing list of tokens of one answer into text.

    Example:
        `writer.write(tokens)` gives the new text; `writer.stopped` says that a stop text has come.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
        *,
        skip_special: bool = True,
        keep_stop: bool = False,
        least: int = 0,
    ) -> None:
        """Begin an answer.

        Args:
            tokenizer: turns tokens into text.
            stops: texts before which the answer ends.
            prompt: what the answer goes on from. Without it, the answer's text begins as a text of its own, which for
                some tokenizers has no space before the first word.
            skip_special: leave special tokens out.
            keep_stop: end the text behind the stop text instead of before it.
            least: tokens at the beginning in which no stop text ends the answer.
        """
        self._skip, self._keep_stop, self._least = skip_special, keep_stop, least
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self.text = ""
        """All text that has been given out."""
        self.stop: str | None = None
        """The stop text that has come."""
        self.offsets: list[int] = []
        """Where in the text each token begins."""
        self._decoded = ""  # given out, or held back
        self._unstopped = 0  # characters at the beginning in which no stop text may end
        before = list(prompt[-CONTEXT:])
        self._before = [] if self._text(before).endswith(BROKEN) else before
        self._start = 0  # of the tokens that are decoded together
        self._read = len(self._before)  # of those that are text already

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self.stop is not None

    def write(self, tokens: Sequence[int], finished: bool = False) -> str:
        """The text that has become certain since the last call.

        Args:
            tokens: all of them so far, without the one that ended the answer.
            finished: no more will come: half a character is given out as it is.
        """
        if self.stopped:
            return ""
        all_tokens = [*self._before, *tokens]
        first = len(self._before) + len(self.offsets)
        for count in range(first + 1, len(all_tokens) + 1):
            self.offsets.append(len(self._decoded))
            self._decode(all_tokens, count, finished and count == len(all_tokens))
            if count - len(self._before) <= self._least:
                self._unstopped = len(self._decoded)
            elif self._stop():  # asked after each token, so that it does not matter how many come at once
                break
        if finished and not self.stopped and self._read < len(all_tokens):
            self._decode(all_tokens, len(all_tokens), True)
            if len(tokens) > self._least:
                self._stop()
        end = len(self._decoded) - (0 if finished or self.stopped else self._held())
        new = self._decoded[len(self.text) : end]
        self.text += new
        return new

    def _decode(self, tokens: Sequence[int], count: int, last: bool) -> None:
        # Decoding begins a few tokens back, because spaces depend on what stands before.
        before = self._text(tokens[self._start : self._read])
        now = self._text(tokens[self._start : count])
        if len(now) > len(before) and (last or not now.endswith(BROKEN)):
            self._decoded += now[len(before) :]
            self._start, self._read = self._read, count
        elif count - self._read > _BYTES and not last:
            # So many bytes in a row are no character; the last few may yet become one. Decoding all of them again for
            # each token would take the square of their number.
            self._decode(tokens, count - 4, True)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)

    def _stop(self) -> bool:
        """Cut the text at the first stop text; whether there is one. What was given out holds none."""
        hits = [(at, stop) for stop in self._stops if (at := self._decoded.find(stop, self._from(stop))) >= 0]
        if hits:
            at, self.stop = min(hits, key=lambda hit: hit[0])
            self._decoded = self._decoded[: at + len(self.stop) * self._keep_stop]
        return self.stopped

    def _from(self, stop: str) -> int:
        """Where a stop text can begin."""
        # Behind what was given out, unless it is part of the text: then nothing is held back for it.
        first = len(self.text) - (len(stop) - 1) * self._keep_stop
        return max(0, first, self._unstopped - len(stop) + 1)

    def _held(self) -> int:
        """Characters at the end that could become a stop text."""
        longest = 0
        if self._keep_stop:
            return longest
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def token_text(tokenizer: Any, token: int, before: Sequence[int]) -> str:
    """The text that one token adds to those before it; part of a character is `BROKEN`."""
    context = list(before[-CONTEXT:])

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    known, whole = text(context), text([*context, token])
    added = whole[len(known) :] if whole.startswith(known) else ""
    return added if added and BROKEN not in added else text([token])


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of a token that is part of a character; None for tokenizers of neither usual way to write them."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):  # SentencePiece's
        return bytes.fromhex(byte[1])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else None


@cache
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies (GPT-2's, and most since) write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
