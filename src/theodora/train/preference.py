"""The trainer of objectives that compare answers: dpo, ipo, orpo, simpo, kto.

The way of a batch is that of `trainer.py`, and so are guards, pieces, graphs, logs and checkpoints; only rows, loss and
what is recorded are others. A pass computes the log-likelihoods of all answers, the reference those of the same batch
(or they were computed beforehand), and `preference_loss` makes a loss of each row. A step's loss is the mean over its
rows, whatever passes and processes they are spread over.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor, nn

from theodora.train.out_of_memory import in_parts
from theodora.train.pairs import (
    DIVERGENCE,
    REFERENCE,
    UNMATCHED,
    VERDICT,
    Sequences,
    taken_apart,
)
from theodora.train.preference_loss import Answers, Settings, judged_losses, pair_losses, rewards
from theodora.train.reference import Reference
from theodora.train.sequence_losses import SequenceLosses
from theodora.train.sequence_trainer import BALANCE, SequenceTrainer, of_balance
from theodora.train.step_state import Metrics

_OF_ALL = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "mean_token_accuracy", "entropy")
_OF_PAIRS = (*_OF_ALL, "rewards/margins", "rewards/accuracies")
_OF_JUDGED = (*_OF_ALL, "kl")


class PreferenceTrainer(SequenceTrainer):
    """Learns from answers that are compared, or judged.

    Args:
        settings: of the objective.
        reference: what the policy is compared with; None for objectives that compare with nothing.
        **kwargs: as of `SequenceTrainer`; rows are those of `tokenize_preferences`.
    """

    def __init__(self, *args: Any, settings: Settings, reference: Reference | None, **kwargs: Any) -> None:
        self.settings = settings
        super().__init__(*args, reference=reference, **kwargs)
        self.data_collator = Sequences(self.data_collator, settings.judged)
        if settings.precompute_ref_log_probs and reference is not None:
            self.train_dataset = self._with_reference(self.train_dataset)
            self.eval_dataset = None if self.eval_dataset is None else self._with_reference(self.eval_dataset)

    @property
    def figures(self) -> tuple[str, ...]:
        """What is recorded of each pass, by TRL's names."""
        balance = (BALANCE,) if self.aux_loss_enabled else ()
        return (*(_OF_JUDGED if self.settings.judged else _OF_PAIRS), *balance)

    @property
    def sequences_per_row(self) -> int:
        """How many sequences of a row are in one batch."""
        return 1 if self.settings.judged else 2

    def lengths_in_batches(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Overrides `PassOverrides.lengths_in_batches`: of judged answers without those to other prompts."""
        if not self.settings.judged:
            return super().lengths_in_batches(rows)
        own = rows.select_columns(["labels", "lengths"]).map(_first_alone, remove_columns=["lengths"])
        return super().lengths_in_batches(own)

    # Rows of a step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides transformers 5.17 to 5.23's `Trainer.get_batch_samples`: also measures how far the policy has come
        from its reference, on the answers to other prompts of the whole step, which KTO's loss goes by."""
        batches, rows = super().get_batch_samples(*args, **kwargs)
        if self.settings.judged and batches:
            sums = [self._divergence(batch) for batch in batches]
            total = self.processes.sum(torch.stack(sums).sum(0))
            for batch in batches:
                del batch[UNMATCHED]
                batch[DIVERGENCE] = (total[0] / total[1].clamp(min=1)).clamp(min=0)
        return batches, rows

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Overrides `PassOverrides.prediction_step`: KTO goes by the answers to other prompts of the batch."""
        if self.settings.judged and UNMATCHED in inputs:
            total = self._divergence(inputs)
            inputs = {name: value for name, value in inputs.items() if name != UNMATCHED}
            inputs[DIVERGENCE] = (total[0] / total[1].clamp(min=1)).clamp(min=0)
        return super().prediction_step(model, inputs, *args, **kwargs)

    # The loss

    def loss_of(
        self, model: nn.Module, given: dict[str, Any], own: dict[str, Any], items: Any, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Overrides `SequenceTrainer.loss_of`: the mean over rows."""
        losses = self.each(model, given, balanced=self.aux_loss_enabled)
        reference = own.get(REFERENCE)
        if reference is None and self.reference is not None:
            reference = -self.of_reference(given).nats
        answers = Answers(-losses.nats, losses.count, reference)
        if self.settings.judged:
            real, kl = losses.count > 0, self._kl(own)
            each = judged_losses(answers, own[VERDICT], kl, self.settings)
            figures = self._figures_of_judged(answers, losses, own[VERDICT], kl)
        else:
            better, worse = _halves(answers)
            real = (better.tokens > 0) & (worse.tokens > 0)
            each = pair_losses(better, worse, self.settings)
            figures = self._figures_of_pairs(better, worse, losses, real)
        total = torch.where(real, each, torch.zeros_like(each)).sum()
        rows = real.sum() if items is None else torch.as_tensor(items, device=total.device)
        return self.balanced(total / rows.clamp(min=1), losses.balance, items, weight), figures

    def _kl(self, own: dict[str, Any]) -> Tensor:
        kl = own[DIVERGENCE]
        return torch.zeros_like(kl) if self.settings.unpaired_loss == "apo_zero_unpaired" else kl

    @torch.no_grad()
    def _divergence(self, batch: dict[str, Any]) -> Tensor:
        """Σ log π − log π_ref over the answers of a batch to other prompts, and how many there are, (2,)."""
        unmatched = self._prepare_inputs(batch[UNMATCHED])

        def sums(part: dict[str, Any]) -> Tensor:
            given, own = taken_apart(part)
            losses, reference = self.each(self.model, given), own.get(REFERENCE)
            if reference is None:
                reference = -self.of_reference(given).nats
            real = losses.count > 0
            return torch.stack([((-losses.nats - reference) * real).sum(), real.sum()])

        with self.compute_loss_context_manager():
            return torch.stack(in_parts(sums, unmatched)).sum(0)

    # What is recorded

    def _figures_of_pairs(self, better: Answers, worse: Answers, losses: SequenceLosses, real: Tensor) -> Tensor:
        good, bad, rows = rewards(better, self.settings), rewards(worse, self.settings), real.sum()
        of_rows = {
            "rewards/chosen": good,
            "rewards/rejected": bad,
            "rewards/margins": good - bad,
            "rewards/accuracies": good > bad,
            "logps/chosen": better.logps,
            "logps/rejected": worse.logps,
        }
        return self.stacked(
            {
                **{name: ((value * real).sum(), rows) for name, value in of_rows.items()},
                "mean_token_accuracy": (losses.correct[::2].sum(), better.tokens.sum()),
                "entropy": (losses.entropy.sum(), losses.count.sum()),
                **of_balance(losses),
            }
        )

    def _figures_of_judged(self, answers: Answers, losses: SequenceLosses, good: Tensor, kl: Tensor) -> Tensor:
        reward, logps, real = rewards(answers, self.settings), answers.logps, answers.tokens > 0
        yes, no = real & good, real & ~good
        return self.stacked(
            {
                "rewards/chosen": ((reward * yes).sum(), yes.sum()),
                "rewards/rejected": ((reward * no).sum(), no.sum()),
                "logps/chosen": ((logps * yes).sum(), yes.sum()),
                "logps/rejected": ((logps * no).sum(), no.sum()),
                "kl": (kl, torch.ones_like(kl)),
                "mean_token_accuracy": ((losses.correct * yes).sum(), (losses.count * yes).sum()),
                "entropy": (losses.entropy.sum(), losses.count.sum()),
                **of_balance(losses),
            }
        )

    def settle(self, metrics: Metrics) -> None:
        """Overrides `SequenceTrainer.settle`: the margin of judged answers is one of means."""
        super().settle(metrics)
        if self.settings.judged and "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = [metrics["rewards/chosen"][0] - metrics["rewards/rejected"][0]]

    # The reference beforehand

    @torch.no_grad()
    def _with_reference(self, rows: Any) -> Dataset:
        """The rows with the reference's log-likelihoods of their two sequences."""
        assert self.reference is not None
        size = self.settings.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        collate = Sequences(self.data_collator.collate, judged=False)
        found: list[list[float]] = []

        def logps_of(part: list[Any]) -> list[list[float]]:
            with self.compute_loss_context_manager():
                given, _ = taken_apart(self._prepare_inputs(collate(part)))
                return (-self.of_reference(given).nats)[: 2 * len(part)].view(-1, 2).tolist()

        training = self.model.training
        self.model.eval()
        try:
            while len(found) < len(rows):
                part = [rows[n] for n in range(len(found), min(len(found) + size, len(rows)))]
                try:
                    found += logps_of(part)
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    size //= 2
        finally:
            self.model.train(training)
        column = Dataset.from_dict({REFERENCE: found}, features=Features({REFERENCE: List(Value("float32"))}))
        return rows.add_column(REFERENCE, column.data.column(REFERENCE).combine_chunks())


def _first_alone(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": row["labels"][: row["lengths"][0]]}


def _halves(answers: Answers) -> tuple[Answers, Answers]:
    """The better answers and the worse ones."""
    parts = [answers.logps, answers.tokens, answers.reference]
    return (
        Answers(*(None if part is None else part[::2] for part in parts)),  # pyright: ignore[reportArgumentType]
        Answers(*(None if part is None else part[1::2] for part in parts)),  # pyright: ignore[reportArgumentType]
    )
