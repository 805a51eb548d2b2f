"""The text of an answer while its tokens arrive: whole characters only, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "�"  # what decoding gives for part of a character


class Writer:
    """Turns the growing list of tokens of one answer into text.

    Example:
        `writer.write(tokens)` gives the new text; `writer.stopped` says that a stop text has come.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self.text = ""
        """All text that has been given out."""
        self.stopped = False
        self.offsets: list[int] = []
        """Where in the text each token begins."""
        self._decoded = ""  # given out, or held back
        self._start = self._read = 0  # of the tokens that are decoded together; of those that are text already

    def write(self, tokens: Sequence[int], finished: bool = False) -> str:
        """The text that has become certain since the last call.

        Args:
            tokens: all of them so far, without the one that ended the answer.
            finished: no more will come: half a character is given out as it is.
        """
        if self.stopped:
            return ""
        for count in range(len(self.offsets) + 1, len(tokens) + 1):
            self.offsets.append(len(self._decoded))
            self._decode(tokens[:count], finished and count == len(tokens))
        if finished and self._read < len(tokens):
            self._decode(tokens, True)
        end = self._certain(finished)
        new = self._decoded[len(self.text) : end]
        self.text += new
        return new

    def _decode(self, tokens: Sequence[int], last: bool) -> None:
        # Decoding begins a few tokens back, because spaces depend on what stands before.
        before = self._text(tokens[self._start : self._read])
        now = self._text(tokens[self._start :])
        if len(now) > len(before) and (last or not now.endswith(_BROKEN)):
            self._decoded += now[len(before) :]
            self._start, self._read = self._read, len(tokens)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _certain(self, finished: bool) -> int:
        """How far the text may be given out: to a stop text, or to what could become one."""
        found = [at for stop in self._stops if (at := self._decoded.find(stop, self._from(stop))) >= 0]
        if found:
            self.stopped = True
            return max(min(found), len(self.text))
        if finished:
            return len(self._decoded)
        held = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._decoded)), held, -1):
                if self._decoded.endswith(stop[:size]):
                    held = size
                    break
        return len(self._decoded) - held

    def _from(self, stop: str) -> int:
        return max(0, len(self.text) - len(stop))
