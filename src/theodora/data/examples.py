"""What reading a source gives: rows in one of three shapes, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from datasets import Dataset

from theodora.data.left_out import LeftOut

Format = Literal["prompt-completion", "messages", "sharegpt", "alpaca", "text", "preference", "unpaired", "prompts"]
Kind = Literal["answers", "pairs", "ranked", "judged", "prompts", "any"]
"""What rows are to be read as: answers to learn, pairs of a better and a worse one, the same with by how much it is
better (`margin`) where they say so, answers with a verdict, prompts for answers of the model's own; or as what their
columns say."""


@dataclass(frozen=True)
class Examples:
    """Rows to train or evaluate on, in one shape whatever the file's own was.

    The columns of `dataset` are `prompt` and `completion` (both strings, or both lists of messages), or `messages`, or
    `text`; of preferences `prompt`, `chosen` and `rejected` (and `margin` perhaps), of judged answers also `label`.
    Prompts have their reference as `completion` (empty without one), and `columns`, the row as it was, as JSON. Beside
    conversations there may be `tools`. A message is a dict with `role` and, usually, `content`.
    """

    dataset: Dataset
    format: Format
    """How the source wrote its rows."""
    source: str
    description: str = ""
    """One sentence for people: how many rows, how they were read, which columns were left out."""
    left_out: tuple[LeftOut, ...] = ()
    """What the rows of the source hold and nothing is learned from."""
    sha256: str = ""
    """Of all rows of the source as they were read, in their order; a part of them keeps it. Empty if they were made."""

    def __len__(self) -> int:
        return len(self.dataset)

    def with_dataset(self, dataset: Dataset) -> Examples:
        """The same source with other rows."""
        return replace(self, dataset=dataset)
