"""`tokenize_preferences`: pairs and judged answers → token ids and labels of two sequences a row.

A row holds its two sequences one behind the other: of a pair the better and the worse one, of a judged answer the
answer and the one of another row (for the divergence in KTO's loss). `lengths` says where the first ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from theodora.data.examples import Examples
from theodora.data.left_out import LeftOut
from theodora.data.pieces import Tokens
from theodora.data.tokens import Batches, Counts, Text, encoded_rows, lists, progress_bars
from theodora.errors import ConfigError, DataError
from theodora.kernels.cross_entropy import IGNORED

MARGIN = "margin"
UNMATCHED = "unmatched"
"""The column of another row's completion."""


def tokenize_preferences(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    use_chat_template: bool | None = None,
    cut: bool = True,
) -> Dataset:
    """Token ids and labels of preferences, as `tokenize` makes them of a prompt and each answer by itself.

    Args:
        examples: from `load_examples` with `kind` "pairs", "ranked" or "judged".
        tokenizer: as in `tokenize`.
        max_length: most tokens in a sequence, prompt and answer together.
        use_chat_template: as in `tokenize`.
        cut: whether longer sequences are cut at their end; else their rows are left out.

    Returns:
        A dataset with `input_ids` and `labels` (int32, both sequences one behind the other), `lengths` (int32, 2), of
        judged answers `label` (bool), and of pairs that have one `margin` (float32). What was cut or dropped stands, in
        words, in its `info.description`.

    Raises:
        DataError: the chat template refuses rows, or no row is left.
        ConfigError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("The tokenizer has no EOS token, so that a model never learns to stop; set its eos_token")
    judged = examples.format == "unpaired"
    if judged:
        examples = _with_unmatched(examples)
    batches = _Pairs(examples, tokenizer, max_length, use_chat_template, judged, cut)
    tokenised = encoded_rows(batches, examples)
    if not len(tokenised) and len(examples):
        counts = batches.counts
        if counts.long:
            raise DataError(
                f"{examples.source}: none of {len(examples):,} rows is of use: in {counts.long:,} an answer with its "
                f"prompt is longer than max_length={max_length} (raise it), and {counts.equal:,} pairs have the same "
                "answer twice"
            )
        raise DataError(
            f"{examples.source}: none of {len(examples):,} rows is of use: {counts.equal:,} pairs have the same answer "
            f"twice, in {counts.dropped:,} an answer is cut off at max_length={max_length} (raise it), and of "
            f"{counts.unseen:,} the chat template shows nothing"
        )
    return tokenised


def parted(row: Any) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """`input_ids` and `labels` of both sequences of a row of `tokenize_preferences`."""
    cut = row["lengths"][0]
    return (
        {name: row[name][:cut] for name in ("input_ids", "labels")},
        {name: row[name][cut:] for name in ("input_ids", "labels")},
    )


def as_answers(examples: Examples) -> Examples:
    """Pairs as prompts with the better answer; other rows as they are."""
    if examples.format != "preference" or "rejected" not in examples.dataset.column_names:
        return examples
    rows = examples.dataset.remove_columns(["rejected"]).rename_column("chosen", "completion")
    return examples.with_dataset(rows)


def _with_unmatched(examples: Examples) -> Examples:
    """Each row with the completion of another: of one half of all rows away, so that neighbours do not meet."""
    rows = len(examples)
    if rows < 2:
        raise DataError(f"{examples.source}: {rows} judged answer; expected two at least, which are told apart")
    other = examples.dataset.select((np.arange(rows) + rows // 2) % rows).select_columns(["completion"])
    both = [examples.dataset, other.rename_column("completion", UNMATCHED)]
    with progress_bars(shown=False):
        return examples.with_dataset(concatenate_datasets(both, axis=1))


@dataclass
class _PairCounts(Counts):
    equal: int = 0
    long: int = 0
    judged: bool = False
    first: int = 0
    second: int = 0

    @property
    def are_worth_saying(self) -> bool:
        return bool(self.equal or self.long) or super().are_worth_saying

    def describe(self, max_length: int, left_out: Sequence[LeftOut]) -> str:
        said = super().describe(max_length, left_out).rstrip(".")
        pairs = max(1, self.rows)
        if self.equal:
            said += f"; {self.equal:,} pairs dropped: both answers are the same tokens"
        if self.long:
            said += f"; {self.long:,} pairs dropped: longer than max_length={max_length}"
        if not self.judged:
            said += f"; an answer has {self.first / pairs:,.0f} tokens on average if it is the better one, and"
            said += f" {self.second / pairs:,.0f} if it is the worse"
        return said + "."


class _Pairs(Batches):
    """Encodes pairs; both sequences of a row are kept, or none."""

    counts: _PairCounts

    def __init__(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        use_chat_template: bool | None,
        judged: bool,
        cut: bool,
    ) -> None:
        super().__init__(examples, tokenizer, max_length, use_chat_template, "completion")
        self.counts = _PairCounts(judged=judged)
        self.judged, self.cuts = judged, cut
        self.own: dict[str, Any] = {"label": (Value("bool"), pa.bool_())} if judged else {}
        if MARGIN in examples.dataset.column_names:
            self.own[MARGIN] = Value("float32"), pa.float32()
        self.answers = ("completion", UNMATCHED) if judged else ("chosen", "rejected")
        self.more_columns = {"lengths": List(Value("int32")), **{name: kind for name, (kind, _) in self.own.items()}}

    def encode(self, table: Any, indices: list[int]) -> Any:
        """One batch, as a pyarrow table; a row gives one row or none."""
        rows = self.rows(table)
        texts: list[Text] = []
        kept: list[dict[str, Any]] = []
        for index, row in zip(indices, rows, strict=True):
            before = self.counts.unseen
            pair = [self.text(index, {**row, "completion": row[name]}) for name in self.answers]
            self.counts.unseen = min(self.counts.unseen, before + 1)
            if pair[0] is not None and pair[1] is not None:
                texts += [pair[0], pair[1]]
                kept.append(row)
        whole = [*self.tokenised(texts)]
        long = [not self.cuts and len(ids) > self.max_length for ids, _ in whole]
        sequences = [self._cut(ids, labels) for ids, labels in whole]
        made: list[tuple[Tokens, Tokens, int, dict[str, Any]]] = []
        for number, row in enumerate(kept):
            first, second = sequences[2 * number : 2 * number + 2]
            learned = [int(np.count_nonzero(labels != IGNORED)) for _, labels in (first, second)]
            if any(long[2 * number : 2 * number + 2]):
                self.counts.long += 1
            elif not all(learned):
                self.counts.dropped += 1
            elif not self.judged and np.array_equal(first[0], second[0]):
                self.counts.equal += 1
            else:
                self._count(first, second, learned)
                ids, labels = (np.concatenate(both) for both in zip(first, second, strict=True))
                made.append((ids, labels, len(first[0]), row))
        lengths = [np.array([cut, len(ids) - cut], np.int32) for ids, _, cut, _ in made]
        columns = {
            "input_ids": lists([ids for ids, _, _, _ in made]),
            "labels": lists([labels for _, labels, _, _ in made]),
            "lengths": lists(lengths),
        }
        columns |= {name: pa.array([row[name] for *_, row in made], kind) for name, (_, kind) in self.own.items()}
        return pa.table(columns)

    def _cut(self, ids: Tokens, labels: Tokens) -> tuple[Tokens, Tokens]:
        self.counts.cut += self.cuts and len(ids) > self.max_length
        labels = labels[: self.max_length].copy()
        labels[:1] = IGNORED  # nothing before it predicts it
        return ids[: self.max_length], labels

    def _count(self, first: tuple[Tokens, Tokens], second: tuple[Tokens, Tokens], learned: list[int]) -> None:
        counts = self.counts
        counts.rows += 1
        counts.tokens += len(first[0]) + len(second[0])
        counts.learned += sum(learned)
        counts.first += learned[0]
        counts.second += learned[1]
