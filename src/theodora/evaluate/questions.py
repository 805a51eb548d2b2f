"""Rows made ready to be scored, once: several models can then be scored on them without tokenising anything again."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.data import Examples, tokenize
from theodora.data.hidden import left_out_of
from theodora.data.left_out import LeftOut
from theodora.data.prompts import encode_prompts, expected_answers, is_verbatim
from theodora.data.tokens import ROW
from theodora.errors import DataError
from theodora.evaluate.labels import Choice, choices


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Tokenised rows, and what is needed to ask for answers to them."""

    source: str
    rows: int
    """Rows of the source; a long text may be several in `input_ids`."""
    input_ids: list[list[int]]
    labels: list[list[int]]
    numbers: list[int] = field(default_factory=list[int])
    """Which row of the source, from 0 on, each of `input_ids` is of; empty if that was not asked for."""
    prompts: list[list[int]] = field(default_factory=list[list[int]])
    """Empty where no answers are asked for."""
    references: list[str] = field(default_factory=list[str])
    """What a model that answers exactly writes, reasoning and tool calls included."""
    single_line: bool = False
    """Whether an answer ends with its first line."""
    choices: list[Choice] = field(default_factory=list[Choice])
    """Empty where there are no labels to choose from."""
    unit: str | None = None
    """What each of `input_ids` is, if it is no row and no piece of a text."""
    left_out: tuple[LeftOut, ...] = ()
    """What the rows hold that no model is shown or asked for."""

    def token_ids(self) -> Iterator[list[int]]:
        """The ids of everything that a model will be shown, row by row."""
        yield from self.input_ids
        yield from self.prompts
        yield from (choice.prefix + ending for choice in self.choices for ending in choice.endings)


def questions(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    use_chat_template: bool | None = None,
    answered: bool = True,
    labels: Sequence[str] | None = None,
    numbered: bool = False,
) -> Questions:
    """Tokenise rows for scoring.

    Args:
        examples: rows as `load_examples` returns them.
        tokenizer: of the models to score.
        max_length: tokens after which a row is cut.
        use_chat_template: as in `tokenize`.
        answered: whether models will be asked to answer the prompts. Plain text has none.
        labels: the closed set of answers to choose from.
        numbered: say which row each sequence of tokens is of.

    Raises:
        DataError: there is no row, or rows do not fit the labels.
    """
    if not len(examples):
        raise DataError(f"{examples.source} holds no rows; expected at least one")
    tokenized = tokenize(
        examples, tokenizer, max_length=max_length, use_chat_template=use_chat_template, numbered=numbered
    )
    prompts: list[list[int]] = []
    references: list[str] = []
    single_line = False
    if answered and examples.format != "text":
        rows: list[Any] = list(examples.dataset)
        prompts = encode_prompts(rows, tokenizer, use_chat_template)
        references = expected_answers(rows, tokenizer, use_chat_template)
        # Without a template nothing tells an untrained model where an answer ends.
        single_line = is_verbatim(rows[0], tokenizer, use_chat_template) and not any(
            "\n" in reference.strip() for reference in references
        )
    chosen = (
        choices(examples, tokenizer, labels, max_length=max_length, use_chat_template=use_chat_template)
        if labels is not None
        else []
    )
    return Questions(
        source=examples.source,
        rows=len(examples),
        input_ids=list(tokenized["input_ids"]),
        labels=list(tokenized["labels"]),
        numbers=list(tokenized[ROW]) if numbered else [],
        prompts=prompts,
        references=references,
        single_line=single_line,
        choices=chosen,
        left_out=(*examples.left_out, *left_out_of(tokenized)),
    )


def context_window(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that both model and tokenizer take (a tokenizer that knows no limit says 1e30)."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(known or sys.maxsize, tokenizer.model_max_length)


def warn_of_long_answers(tokenizer: PreTrainedTokenizerBase, references: Sequence[str], max_new_tokens: int) -> None:
    """Warn of references that no answer of `max_new_tokens` can equal."""
    lengths = [len(ids) for ids in tokenizer(list(references), add_special_tokens=False)["input_ids"]]
    too_long = sum(length > max_new_tokens for length in lengths)
    if too_long:
        warnings.warn(
            f"{too_long} of {len(lengths)} reference answers are longer than max_new_tokens ({max_new_tokens}) and "
            f"count as not matched; the longest has {max(lengths)} tokens",
            stacklevel=5,
        )
