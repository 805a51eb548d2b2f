"""The batches of grpo: prompts, each asked several times in a row, and the completions that were drawn for them.

Legend: S sequences, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from theodora.config import TrainConfig
from theodora.data.tokens import ROW
from theodora.errors import ConfigError
from theodora.kernels.cross_entropy import IGNORED
from theodora.train.fused_loss import LEARNED
from theodora.train.pairs import ADVANTAGE, OLD, ROWS, SAMPLED, TOGETHER, Collate, count_of
from theodora.train.rollouts import Completion

PROMPTS = "prompts"
"""In a batch as it is loaded: its `Asked`, and nothing else."""
PLACE = "place"
"""Of a row: where it stands among all rows, of which each prompt has several."""


@dataclass(frozen=True)
class Asked:
    """Prompts of a batch. (An object of its own, into whose numbers no loader looks.)"""

    tokens: list[list[int]]
    rows: list[int]
    """The number of each among the examples."""
    places: list[int]
    """What tells completions of one prompt apart: their random numbers go by it, whatever batch they come in."""

    def __getitem__(self, some: slice) -> Asked:
        return Asked(self.tokens[some], self.rows[some], self.places[some])


def asked_for(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of these rows, before anything was drawn: a collator."""
    numbers = ([int(row[name]) for row in rows] for name in (ROW, PLACE))
    return {PROMPTS: Asked([list(row["input_ids"]) for row in rows], *numbers), ROWS: len(rows)}


class Repeated(Sampler[int]):
    """Every prompt as often in a row as completions are drawn for it, prompts in an order of each epoch's own.

    Where a step's completions are learned from in several steps, its prompts come as often, and an epoch ends with some
    of its first prompts again, so that all steps have as many.

    Args:
        prompts: how many there are; a dataset holds each `times` in a row.
        times: completions of each.
        seed: of the orders; None for the order of the data.
        iterations: steps that learn from the same completions.
        per_step: prompts of a step.
    """

    def __init__(self, prompts: int, times: int, seed: int | None, iterations: int = 1, per_step: int = 1) -> None:
        self.prompts, self.times, self.seed = prompts, times, seed
        self.iterations, self.per_step = iterations, min(per_step, prompts)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        order = torch.arange(self.prompts)
        if self.seed is not None:
            order = torch.randperm(self.prompts, generator=torch.Generator().manual_seed(self.seed + epoch))
        self._order: list[int] = order.tolist()
        if self.iterations > 1:
            self._order += self._order[: -self.prompts % self.per_step]

    def __len__(self) -> int:
        return len(self._order) * self.times * self.iterations

    def __iter__(self) -> Iterator[int]:
        size = self.per_step if self.iterations > 1 else len(self._order)
        for begin in range(0, len(self._order), size):
            for _ in range(self.iterations):
                for prompt in self._order[begin : begin + size]:
                    yield from range(prompt * self.times, (prompt + 1) * self.times)


def check_completions(config: TrainConfig, times: int, processes: int) -> None:
    """Refuse steps that would not have all completions of a prompt.

    Raises:
        ConfigError: naming sizes that would do.
    """
    size, batches = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if size * batches * processes % times:
        among = f" × {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"A step has {size * batches * processes} completions (per_device_train_batch_size {size} × "
            f"gradient_accumulation_steps {batches}{among}), and num_generations is {times}; expected a multiple of "
            f"it, so that all completions of a prompt are in one step: per_device_train_batch_size {times}, say"
        )


def repeated(rows: Dataset, times: int) -> Dataset:
    """Each row several times, one after the other, with a number of its own."""
    several = rows.select([row for row in range(len(rows)) for _ in range(times)])
    return several.add_column(PLACE, list(range(len(several))))


class DrawnBatches:
    """A collator of prompts with the completions that were drawn for them, by one of rows.

    Args:
        collate: makes a batch of rows with `input_ids` and `labels`.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Completion],
        learned: Sequence[bool],
        advantage: Tensor,
        old: Sequence[Sequence[float]] | None = None,
    ) -> dict[str, Any]:
        """The batch.

        Args:
            prompts: tokens of each.
            completions: of each.
            learned: whether each is learned from.
            advantage: of each, (S,) float32.
            old: log-probabilities of each one's tokens under the policy that drew them, if it is another by now.
        """
        rows = [
            {
                "input_ids": prompt + drawn.tokens,
                "labels": [IGNORED] * len(prompt) + (drawn.tokens if is_learned else [IGNORED] * len(drawn.tokens)),
            }
            for prompt, drawn, is_learned in zip(prompts, completions, learned, strict=True)
        ]
        batch = self.collate(rows)
        count = count_of(batch, 1)
        if LEARNED in batch:
            batch[LEARNED]["sequences"] = count
        filled = torch.zeros(count)
        filled[: len(advantage)] = advantage
        shape = batch["input_ids"].shape
        of_tokens = {SAMPLED: [drawn.logps for drawn in completions]} | ({} if old is None else {OLD: old})
        return {
            **batch,
            TOGETHER: 1,
            ROWS: sum(learned),
            ADVANTAGE: filled,
            **{
                name: laid_out([[0.0] * len(p) + [*own] for p, own in zip(prompts, values, strict=True)], shape)
                for name, values in of_tokens.items()
            },
        }


def laid_out(values: Sequence[Sequence[float]], shape: torch.Size) -> Tensor:
    """Values of each sequence's tokens where these stand in a batch, (B, T) float32: rows padded on the right, or one
    row of all."""
    grid = torch.zeros(shape)
    if shape[0] == 1:
        flat = torch.tensor([value for row in values for value in row])
        grid[0, : len(flat)] = flat
    else:
        for row, own in enumerate(values):
            grid[row, : len(own)] = torch.tensor(own)
    return grid
