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

from theodora.data.tokens import ROW
from theodora.errors import ConfigError
from theodora.kernels.cross_entropy import IGNORED
from theodora.train.fused_loss import LEARNED
from theodora.train.grpo_loss import PolicySettings
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

    Where several steps learn from what was drawn at once, its prompts come as often as it is learned from, and an epoch
    ends with some of its first prompts again, so that as many are drawn for each time.

    Args:
        prompts: how many there are; a dataset holds each `times` in a row, and all of them `copies_of` times.
        times: completions of each.
        seed: of the orders; None for the order of the data.
        iterations: how often the same completions are learned from.
        at_once: prompts whose completions are drawn at once, for several steps; None: for each step, however many
            prompts the last one of an epoch has.
    """

    def __init__(
        self, prompts: int, times: int, seed: int | None, iterations: int = 1, at_once: int | None = None
    ) -> None:
        self.prompts, self.times, self.seed = prompts, times, seed
        self.iterations, self.at_once = iterations, at_once
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        order = torch.arange(self.prompts)
        if self.seed is not None:
            order = torch.randperm(self.prompts, generator=torch.Generator().manual_seed(self.seed + epoch))
        self._order: list[int] = order.tolist()
        if self.at_once is not None:
            again = [self._order[place % self.prompts] for place in range(-self.prompts % self.at_once)]
            if self.at_once > self.prompts:  # a prompt that comes twice among them has other random numbers then
                again = [prompt + (1 + n // self.prompts) * self.prompts for n, prompt in enumerate(again)]
            self._order += again

    def __len__(self) -> int:
        return len(self._order) * self.times * self.iterations

    def __iter__(self) -> Iterator[int]:
        size = self.at_once or len(self._order)
        for begin in range(0, len(self._order), size):
            for _ in range(self.iterations):
                for prompt in self._order[begin : begin + size]:
                    yield from range(prompt * self.times, (prompt + 1) * self.times)


def steps_at_once(settings: PolicySettings, size: int, batches: int, processes: int) -> int:
    """For how many steps completions are drawn at once.

    Args:
        settings: of the objective.
        size: completions of a batch (per_device_train_batch_size).
        batches: of a step, in each process (gradient_accumulation_steps).
        processes: that train.

    Raises:
        ConfigError: not for whole steps, or not all completions of a prompt; naming sizes that would do.
    """
    step, times, wanted = size * batches * processes, settings.num_generations, settings.steps_per_generation
    among = f" × {processes} processes" if processes > 1 else ""
    has = f"per_device_train_batch_size {size} × gradient_accumulation_steps {batches}{among}"
    if wanted is not None and wanted % batches:
        raise ConfigError(
            f"steps_per_generation is {wanted}, counted in batches (as TRL counts), and gradient_accumulation_steps is "
            f"{batches}; expected a multiple of it, so that completions are drawn for whole optimizer steps: {batches} "
            f"for each step, {2 * batches} for two at once"
        )
    if settings.generation_batch_size is not None and settings.generation_batch_size % step:
        raise ConfigError(
            f"generation_batch_size is {settings.generation_batch_size}, and a step has {step} completions ({has}); "
            f"expected a multiple of it: {step} for each step, {2 * step} for two at once"
        )
    steps = (settings.generation_batch_size or step) // step if wanted is None else wanted // batches
    if steps * step % times:
        are_drawn = (
            f"A step has {step}" if steps == 1 else f"{steps * step} are drawn at once, for {steps} steps of {step}"
        )
        raise ConfigError(
            f"{are_drawn} completions ({has}), and num_generations is {times}; expected a multiple of it, so that all "
            f"completions of a prompt are drawn together: per_device_train_batch_size {times}, say"
        )
    return steps


def copies_of(prompts: int, at_once: int | None) -> int:
    """How often a dataset has to hold all its prompts, for `Repeated`."""
    return 1 if at_once is None else max(1, -(-at_once // prompts))


def repeated(rows: Dataset, times: int, copies: int = 1) -> Dataset:
    """Each row several times, one after the other, with a number of its own; and all of that as often as `copies`."""
    several = rows.select([row for _ in range(copies) for row in range(len(rows)) for _ in range(times)])
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
