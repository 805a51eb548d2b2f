"""`tokenize_prompts`: prompts → token ids that end where an answer begins; `PromptRows`: what rewards get of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from theodora.data.chat import ChatRenderer, tools_of
from theodora.data.examples import Examples
from theodora.data.hidden import Hidden
from theodora.data.left_out import LeftOut, sentences
from theodora.data.messages import Message, assistant
from theodora.data.prompts import encode_rendered, question_and_answer, reference_answer, rendered
from theodora.data.templates import TEMPLATE_ERRORS
from theodora.data.tokens import ROW, Batches, Counts, encoded_rows, lists, row_in_words
from theodora.errors import ConfigError, DataError
from theodora.kernels.cross_entropy import IGNORED

REFERENCE = "reference"
"""What functions call the text to compare with, unless the rows have a column of that name."""
_AT_ONCE = 1000
_OF_PROMPTS = (Hidden.TOOLS, Hidden.CALLS, Hidden.RESULTS, Hidden.SYSTEM, Hidden.USER, Hidden.NAMES)


def tokenize_prompts(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, *, max_prompt: int, use_chat_template: bool | None = None
) -> Dataset:
    """Token ids of prompts, as `encode_prompt` makes them.

    Args:
        examples: from `load_examples` with `kind` "prompts".
        tokenizer: as in `tokenize`.
        max_prompt: most tokens of a prompt; rows with longer ones are left out.
        use_chat_template: as in `tokenize`.

    Returns:
        A dataset with `input_ids` and `labels` (int32, all -100: nothing of a prompt is learned), and `row` (int64):
        which of the examples it is. What was left out stands, in words, in its `info.description`.

    Raises:
        DataError: the chat template refuses rows, or no row is left.
        ConfigError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("The tokenizer has no EOS token, so that a model never learns to stop; set its eos_token")
    batches = _Prompts(examples, tokenizer, max_prompt, use_chat_template)
    tokenised = encoded_rows(batches, examples)
    if not len(tokenised) and len(examples):
        raise DataError(
            f"{examples.source}: none of {len(examples):,} prompts leaves room for an answer: all have more than "
            f"{max_prompt:,} tokens (max_length, or the model's window, less max_completion_length). Raise max_length, "
            "or lower max_completion_length"
        )
    return tokenised


class PromptRows:
    """What functions that judge answers are given of the rows that were asked.

    Args:
        examples: from `load_examples` with `kind` "prompts".
    """

    def __init__(self, examples: Examples) -> None:
        self.source, self._rows = examples.source, examples.dataset
        names: dict[str, None] = {}
        self.unanswered: list[int] = []
        """Numbers of the rows that have nothing to compare with."""
        for begin in range(0, len(self._rows), _AT_ONCE):
            batch: list[Any] = self._rows.select(range(begin, min(begin + _AT_ONCE, len(self._rows)))).to_list()
            for number, row in enumerate(batch, begin):
                names.update(dict.fromkeys(json.loads(row["columns"])))
                if not reference_answer(row).strip():
                    self.unanswered.append(number)
        self.names = tuple(names) if REFERENCE in names else (*names, REFERENCE)
        """Of all columns: those of the file, and `reference`."""

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, rows: Sequence[int]) -> tuple[list[str | list[Message]], dict[str, list[Any]]]:
        """The prompts of rows, by number (several times, if asked for), and each of their columns, `names` -> values.

        A row without a column has None there.
        """
        found = {number: self._rows[int(number)] for number in dict.fromkeys(rows)}
        each = {number: self._columns(row) for number, row in found.items()}
        prompts = [found[number]["prompt"] for number in rows]
        return prompts, {name: [each[number].get(name) for number in rows] for name in self.names}

    def references(self, rows: Sequence[int]) -> list[str]:
        """What answers to these rows are compared with; empty without it."""
        return [reference_answer(self._rows[int(number)]) for number in rows]

    def _columns(self, row: dict[str, Any]) -> dict[str, Any]:
        return {
            REFERENCE: reference_answer(row) if reference_answer(row).strip() else None,
            **json.loads(row["columns"]),
        }


class _PromptCounts(Counts):
    def describe(self, max_length: int, left_out: Sequence[LeftOut]) -> str:
        parts = [f"{self.rows:,} prompts, {self.tokens:,} tokens"]
        if self.dropped:
            parts.append(
                f"{self.dropped:,} {'prompt' if self.dropped == 1 else 'prompts'} left out: more than {max_length:,} "
                "tokens, which leaves no room for max_completion_length"
            )
        return "; ".join([*parts, *sentences(left_out)]) + "."


class _Prompts(Batches):
    """Encodes prompts; what follows them is the model's to write."""

    counts: _PromptCounts

    def __init__(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, max_prompt: int, use_chat_template: bool | None
    ) -> None:
        super().__init__(examples, tokenizer, max_prompt, use_chat_template, "completion")
        self.counts = _PromptCounts()
        self.more_columns = {ROW: Value("int64")}

    def encode(self, table: Any, indices: list[int]) -> Any:
        """One batch, as a pyarrow table; a row gives one row or none."""
        texts: dict[int, str] = {}
        for index, row in zip(indices, self.rows(table), strict=True):
            try:
                texts[index] = rendered(row, self.renderer)
            except DataError as error:
                self.problems.add(row_in_words(index, question_and_answer(row)[0]), str(error.__cause__ or error))
                continue
            if self.renderer is not None:
                self._count_hidden(self.renderer, row)
        encoded = encode_rendered([*texts.values()], self.tokenizer, verbatim=self.renderer is None)
        kept = [(ids, index) for ids, index in zip(encoded, texts, strict=True) if 0 < len(ids) <= self.max_length]
        self.counts.dropped += len(texts) - len(kept)
        self.counts.rows += len(kept)
        self.counts.tokens += sum(len(ids) for ids, _ in kept)
        return pa.table(
            {
                "input_ids": lists([np.array(ids, np.int32) for ids, _ in kept]),
                "labels": lists([np.full(len(ids), IGNORED, np.int32) for ids, _ in kept]),
                ROW: pa.array([index for _, index in kept], pa.int64()),
            }
        )

    def _count_hidden(self, renderer: ChatRenderer, row: dict[str, Any]) -> None:
        """Note what the template does not show of a prompt."""
        try:
            chat = renderer.render_for_training([*question_and_answer(row)[0], assistant("!")], tools_of(row))
        except TEMPLATE_ERRORS:  # it takes the prompt alone
            return
        if chat is not None:
            self.counts.hidden.add({what: turns for what, turns in chat.hidden.items() if what in _OF_PROMPTS})
