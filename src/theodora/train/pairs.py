"""The batches of objectives that compare answers: both sequences of a row, or the one and another row's.

A batch of pairs has the rows better, worse, better, worse, …; of judged answers one a row, and the answers to other
prompts as a batch within it. Legend: S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from theodora.data.sequences import parted
from theodora.kernels.cross_entropy import IGNORED
from theodora.train.fused_loss import LEARNED

TOGETHER = "sequences_together"
"""In a batch: how many neighbouring sequences are one row, which no cut may part."""
ROWS = "rows_learned"
"""In a batch: how many rows there are to learn from."""
REFERENCE, VERDICT, UNMATCHED, DIVERGENCE = "reference", "label", "unmatched", "divergence"
MARGIN = "margin"
"""By how much the better answer of a pair is to be better; in a batch of each of its two sequences."""
ADVANTAGE, SAMPLED, OLD = "advantage", "sampled_logps", "old_logps"
"""Of completions that were drawn: what each is worth; the log-probability that each token was drawn with; the same as
training computes it, by the policy that drew it."""
COLUMNS = ("lengths", REFERENCE, VERDICT, MARGIN)
"""Of a dataset, beside ids and labels."""
OF_SEQUENCES, OF_TOKENS = (REFERENCE, VERDICT, MARGIN, ADVANTAGE), (SAMPLED, OLD)
"""In a batch, what there is of each sequence, (S,), and of each token where it stands, (B, T)."""
_OWN = (TOGETHER, ROWS, *OF_SEQUENCES, *OF_TOKENS, UNMATCHED, DIVERGENCE)

Collate = Callable[[list[Any]], dict[str, Any]]


class Sequences:
    """A collator of rows with two sequences each, by one of single sequences."""

    def __init__(self, collate: Collate, judged: bool) -> None:
        self.collate, self.judged = collate, judged

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of these rows."""
        both = [parted(row) for row in rows]
        known = [row.get(REFERENCE, (None, None)) for row in rows]
        learned = sum(any(label != IGNORED for label in row["labels"]) for row in rows)
        if not self.judged:
            sequences = [sequence for pair in both for sequence in pair]
            batch = self._batch(sequences, [logp for pair in known for logp in pair], 2, learned)
            margins = [row[MARGIN] for row in rows for _ in range(2) if MARGIN in row]
            return {**batch, **({MARGIN: _filled(margins, count_of(batch, 2), torch.float32)} if margins else {})}
        batch, other = (
            self._batch([pair[n] for pair in both], [pair[n] for pair in known], 1, learned) for n in (0, 1)
        )
        verdicts = _filled([bool(row[VERDICT]) for row in rows], count_of(batch, 1), torch.bool)
        return {**batch, VERDICT: verdicts, UNMATCHED: other}

    def _batch(
        self, sequences: list[dict[str, Any]], logps: list[float | None], together: int, learned: int
    ) -> dict[str, Any]:
        batch = self.collate(sequences)
        count = count_of(batch, together)
        if LEARNED in batch:
            batch[LEARNED]["sequences"] = count
        if logps[0] is not None:
            batch[REFERENCE] = _filled(logps, count, torch.float32)
        return {**batch, TOGETHER: together, ROWS: learned}


def count_of(batch: dict[str, Any], together: int) -> int:
    """S: sequences of a batch, with those that fill up a flattened one, as many as are whole rows of `together`."""
    bounds = batch[LEARNED]["bounds"] if LEARNED in batch else None
    count = batch["input_ids"].shape[0] if bounds is None else len(bounds) - 1
    return -(-count // together) * together


def taken_apart(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is given of a batch, and what the objective."""
    return {k: v for k, v in batch.items() if k not in _OWN}, {k: v for k, v in batch.items() if k in _OWN}


def _filled(values: list[Any], count: int, dtype: torch.dtype) -> Tensor:
    """Values of each sequence, (S,), zeros for those that fill up."""
    tensor = torch.zeros(count, dtype=dtype)
    tensor[: len(values)] = torch.tensor(values, dtype=dtype)
    return tensor
