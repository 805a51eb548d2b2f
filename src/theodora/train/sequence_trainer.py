"""The trainer of objectives whose loss goes by whole sequences: answers that are compared, or rewarded.

The way of a batch is that of `trainer.py`, and so are guards, pieces, graphs, logs and checkpoints; only rows, loss and
what is recorded are others. A pass computes the log-likelihoods of its tokens, of the policy and where it is asked for
of a reference, and the objective makes a loss of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from theodora.train.fused_loss import LEARNED, Head, SelectLearned
from theodora.train.graphed import batch_of
from theodora.train.loss import logits_fit, row_losses
from theodora.train.pairs import COLUMNS, ROWS, count_of, taken_apart
from theodora.train.reference import Reference
from theodora.train.sequence_losses import SequenceLosses
from theodora.train.step_state import Metrics
from theodora.train.trainer import AdapterTrainer

BALANCE = "aux_loss"
_OBJECTIVE = "objective."
_SUM, _COUNT = "sum of ", "number of "


class SequenceTrainer(AdapterTrainer):
    """`AdapterTrainer` with a loss that its subclasses make of those of sequences.

    Args:
        reference: what the policy is compared with; None for objectives that compare with nothing.
        **kwargs: as of `AdapterTrainer`.
    """

    def __init__(self, *args: Any, reference: Reference | None, **kwargs: Any) -> None:
        self.reference = reference
        super().__init__(*args, **kwargs)  # which places the model
        if reference is not None:
            reference.place()
        self.means = tuple(kind + name for name in self.figures for kind in (_SUM, _COUNT))

    @property
    @abstractmethod
    def figures(self) -> tuple[str, ...]:
        """What is recorded, by TRL's names."""

    @property
    def pass_figures(self) -> tuple[str, ...]:
        """What of it each pass records."""
        return self.figures

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        return 1.0

    @abstractmethod
    def loss_of(
        self, model: nn.Module, given: dict[str, Any], own: dict[str, Any], items: Any, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what is recorded of it: a sum and a number for each of `pass_figures`, (2, F).

        Args:
            model: the policy, or a wrapper of it.
            given: what it is given.
            own: what the batch has for the objective.
            items: what the losses of the whole step are divided by; None where the batch stands by itself.
            weight: of the loss that keeps experts balanced, as of `mean_of_step`.
        """

    def _set_signature_columns_if_needed(self) -> None:
        """Overrides TRL 1.16's `SFTTrainer._set_signature_columns_if_needed`: rows have columns of their own."""
        self._signature_columns = ["input_ids", "labels", *COLUMNS]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Overrides transformers 5.17 to 5.23's `Trainer._get_num_items_in_batch`: rows, not tokens."""
        return torch.tensor(sum(batch[ROWS] for batch in batch_samples), device=device)

    def items_of(self, inputs: dict[str, Any]) -> float:
        """Overrides `LossOverrides.items_of`: rows."""
        return inputs[ROWS]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Overrides `LossOverrides.compute_loss`: that of the objective."""
        given, own = taken_apart(inputs)
        loss, figures = self.loss_of(model, given, own, num_items_in_batch)
        self.record(figures, _tokens_of(given))
        return loss

    # The losses of sequences

    def each(self, model: Any, given: dict[str, Any], balanced: bool = False) -> SequenceLosses:
        """The losses of each sequence under a model: ours from the hidden states on a GPU, or from its own logits.

        `balanced` with the loss that keeps experts balanced, which is the policy's alone.
        """
        if LEARNED not in given:
            head = None if self._logits_fit(given["labels"]) else self._readable_head
            if head is None:
                return row_losses(model, given, self._takes_positions, balanced, self.temperature)
            told = SelectLearned(lambda _: dict(given), with_real=balanced)([])
            learned = told.pop(LEARNED) | {"sequences": len(given["labels"]), "unbalanced": not balanced}
            told.pop("labels")
            return head.loss(model, learned, **told)  # pyright: ignore[reportReturnType]
        inputs = {name: value for name, value in given.items() if name != "labels"}
        if not balanced:
            inputs[LEARNED] = {**inputs[LEARNED], "unbalanced": True}
        if model is self.model or not isinstance(self.head, Head):
            return model(**inputs)
        return self.head.loss(model, inputs.pop(LEARNED), **inputs)  # pyright: ignore[reportReturnType]

    def of_reference(self, given: dict[str, Any]) -> SequenceLosses:
        """The same under the reference, without gradients."""
        assert self.reference is not None
        with self.reference.running() as model:
            return self.each(model, given)

    def _logits_fit(self, labels: Tensor) -> bool:
        return logits_fit(labels, self.model.config.get_text_config().vocab_size)

    @cached_property
    def _readable_head(self) -> Head | None:
        """How logits come from the hidden states, where few of them are to be held at once; None if in no known way."""
        head = None if self.adapts_head else self.read_head()
        return head if isinstance(head, Head) else None

    # The same as a graph

    def _graph_inputs(self, inputs: dict[str, Any], num_items_in_batch: Any) -> dict[str, Tensor] | None:
        """Overrides `PassOverrides._graph_inputs`: with what the objective knows of the batch."""
        given, own = taken_apart(inputs)
        tensors = super()._graph_inputs(given, num_items_in_batch)
        if tensors is None:
            return None
        own = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        return {**tensors, **{_OBJECTIVE + name: value.to(self.args.device) for name, value in own.items()}}

    def _forward_backward(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Overrides `PassOverrides._forward_backward`: both passes, of the policy and of its reference."""
        own = {name.removeprefix(_OBJECTIVE): t for name, t in tensors.items() if name.startswith(_OBJECTIVE)}
        given = {name: t for name, t in tensors.items() if not name.startswith(_OBJECTIVE)}
        inputs, items, weight = batch_of(given, None if self.shapes else self.args.max_length)
        inputs[LEARNED]["sequences"] = count_of(inputs, self.sequences_per_row)
        with self.compute_loss_context_manager():
            loss, figures = self.loss_of(self.model, inputs, own, items, weight)
        self.accelerator.backward(loss)
        return loss.detach(), figures

    # What is recorded

    def stacked(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Sums and numbers in the order of `pass_figures`, (2, F) float32."""
        both = [[found[name][n].detach().float() for name in self.pass_figures] for n in (0, 1)]
        return torch.stack([torch.stack(values) for values in both])

    def record(self, sums: Tensor, tokens: Tensor | int) -> None:
        """Overrides `CountingTrainer.record`: other figures, each with the number that it is a mean over."""
        for name, total, count in zip(self.pass_figures, *sums.detach(), strict=True):
            self.add_to_mean(name, total, count)
        if self.mode == "train":
            self.tokens = self.tokens + tokens
        self.metrics_of(self.mode)["num_tokens"] = [self.tokens]

    def add_to_mean(self, name: str, total: Any, count: Any) -> None:
        """Add to a figure that is logged as one mean."""
        metrics = self.metrics_of(self.mode)
        metrics[_SUM + name].append(total)
        metrics[_COUNT + name].append(count)

    def settle(self, metrics: Metrics) -> None:
        """Overrides `LogOverrides.settle`: means of what was recorded, over exactly the rows that have it."""
        for name in self.figures:
            total, count = (sum(metrics.pop(kind + name, [])) for kind in (_SUM, _COUNT))
            if count:
                metrics[name] = [total / count]


def of_balance(losses: SequenceLosses) -> dict[str, tuple[Tensor, Tensor]]:
    """What is recorded of the loss that keeps experts balanced, if there is one."""
    return {} if losses.balance is None else {BALANCE: (losses.balance, torch.ones_like(losses.balance))}


def _tokens_of(given: dict[str, Any]) -> Any:
    if LEARNED in given:
        return given[LEARNED]["tokens"]
    mask = given.get("attention_mask")
    return given["input_ids"].numel() if mask is None else mask.sum()
