"""The trainer's forward and backward pass of a batch: a CUDA graph where one fits, or TRL's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from theodora.errors import ConfigError
from theodora.kernels.attention_backends import attention_of_new_lengths
from theodora.kernels.graph import GraphedStep
from theodora.layers.experts import AdaptedExperts
from theodora.train.flattened import Costs, Flatten, Shape, choose, lengths_of
from theodora.train.fused_loss import LEARNED, Head, SelectLearned
from theodora.train.graphed import batch_of, graph_inputs, graphs_pay, reads_bounds, why_no_graph
from theodora.train.out_of_memory import split
from theodora.train.packed_rows import goes_by_bounds_alone, keeps_rows_apart, takes_bounds
from theodora.train.trainer_loss import LossOverrides, recorded


class PassOverrides(LossOverrides):
    """Runs one pass of a micro-batch; graphs hold memory, which they let go of when it is needed otherwise."""

    why_no_graph: str | None = "not looked at yet"
    """Why passes are no CUDA graphs, or no longer."""
    graph_replays = 0
    sends_bounds = False
    """Whether packed rows come with the bounds of their sequences instead of a mask."""
    shapes: Sequence[Shape] = ()
    """What batches are filled up to, if their rows are flattened."""
    _graphed: GraphedStep | None = None
    _reads_bounds = True

    def choose_graphs(self) -> None:
        """Find out what batches have to tell, for the loss that was chosen; the collator tells it from then on."""
        self.why_no_graph = self._why_no_graph()
        collate: Any = self.data_collator
        # Experts are counted for their loss, or for the report.
        with_real = self.aux_loss_enabled or any(isinstance(m, AdaptedExperts) for m in self.model.modules())
        if self._flattens(collate):
            self._reads_bounds, self.sends_bounds = False, True
            self.shapes = self._shapes()
            free = replace(collate, padding_free=True)
            self.data_collator = Flatten(free, self.shapes, self._sequences, with_real)
            return
        self._reads_bounds = self.why_no_graph is not None or not self.padding_free or reads_bounds(self.model)
        self.sends_bounds = not self._reads_bounds and self._takes_bounds()
        self._check_packed_rows()
        if isinstance(self.head, Head):
            full = None if self._reads_bounds or not self.args.packing else self.args.max_length
            self.data_collator = SelectLearned(collate, full, self.sends_bounds, with_real)

    def _check_packed_rows(self) -> None:
        """Refuse packed rows that nothing keeps apart in a model with sinks: `prepare` leaves it open there."""
        packs = self.args.packing and self.args.packing_strategy != "wrapped" and not self.sends_bounds
        if packs and goes_by_bounds_alone(self.model) and not keeps_rows_apart(self.model):
            why = self.why_no_graph or f"attention does not take them in {self.model.dtype}"
            raise ConfigError(
                f"packing does not work in this run: a {type(self.model).__name__} keeps the rows in one sequence "
                f"apart only by their bounds, which it is not given here ({why}). Train without packing (--no-packing)."
            )

    def lengths_in_batches(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Tokens, and learned tokens, that each row adds to a batch, int64."""
        return lengths_of(rows)

    @property
    def sequences_per_row(self) -> int:
        """How many sequences of a row are in one batch."""
        return 1

    @property
    def _sequences(self) -> int:
        return self.args.train_batch_size * self.sequences_per_row

    def _why_no_graph(self) -> str | None:
        if not isinstance(self.head, Head):
            return "TRL's loss"
        return why_no_graph(self) if graphs_pay(self.args.device) else f"not on {self.args.device.type}"

    def _flattens(self, collate: Any) -> bool:
        """Whether the rows of a batch can be one row, and nothing goes by the shape that they had otherwise."""
        pads = type(collate) is DataCollatorForLanguageModeling and not collate.padding_free
        # NEFTune's noise is as large as the batch is long.
        free = pads and not collate.pad_to_multiple_of and not self.args.neftune_noise_alpha
        return free and self.why_no_graph is None and self._takes_bounds() and self._keeps_rows_apart()

    def _shapes(self) -> list[Shape]:
        """What flattened batches are filled up to."""
        rows: Any = self.train_dataset
        size, layers = self.args.train_batch_size, self.model.config.get_text_config().num_hidden_layers
        lengths, learned = self.lengths_in_batches(rows)
        batches = self.args.max_steps * self.args.gradient_accumulation_steps
        if batches <= 0:
            batches = math.ceil(self.args.num_train_epochs * len(lengths) / size)
        parameters = self.model.num_parameters(exclude_embeddings=True)
        return choose(lengths, learned, size, Costs.of(parameters, layers, batches))

    def _takes_bounds(self) -> bool:
        with self.compute_loss_context_manager():
            return takes_bounds(self.model, self.args.max_length)

    def _keeps_rows_apart(self) -> bool:
        """Whether all layers go by the positions alone: a state or convolution would run on from row to row.

        With sinks by the bounds alone, which `_takes_bounds` has found.
        """
        model: Any = self.model
        with self.compute_loss_context_manager():
            return (goes_by_bounds_alone(model) or keeps_rows_apart(model)) and not reads_bounds(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides transformers 5.17 to 5.23's `Trainer.train`: graphs do not outlive it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._graphed is not None:
                self.graph_replays, self.why_no_graph = self._graphed.replays, self._graphed.why_not
                self._graphed.release("training has ended")
                self._graphed = None

    def one_pass(self, inputs: dict[str, Any], model: nn.Module, num_items_in_batch: Any) -> Tensor:
        """The forward and backward pass of a batch, or of a piece of one: its share of the step's loss."""
        tensors = self._graph_inputs(inputs, num_items_in_batch)
        if tensors is None or self._graphed is None:
            with nullcontext() if self.args.packing else attention_of_new_lengths(inputs["input_ids"].shape[1]):
                return super().training_step(model, inputs, num_items_in_batch)
        if callable(getattr(self.optimizer, "train", None)):  # some keep other weights for evaluation
            self.optimizer.train()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        loss, sums = self._graphed(tensors)
        self.record(sums.clone(), inputs[LEARNED]["tokens"])  # the next replay writes there again
        return loss.clone()

    def _graph_inputs(self, inputs: dict[str, Any], num_items_in_batch: Any) -> dict[str, Tensor] | None:
        if self.why_no_graph is not None or not isinstance(self.head, Head):
            return None
        if self._graphed is None:
            planned: Any = {"most_shapes": len(self.shapes), "least_share": 0.0} if self.shapes else {}
            self._graphed = GraphedStep(self._forward_backward, list(self.model.parameters()), **planned)
        weight = self.balance_weight(num_items_in_batch)
        return graph_inputs(self._prepare_inputs(inputs), num_items_in_batch, self.head, self._reads_bounds, weight)

    def _forward_backward(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What is captured, on tensors alone: the loss, and what is recorded of it."""
        # What fills up a flattened batch may be longer than any row.
        inputs, num_items_in_batch, weight = batch_of(tensors, None if self.shapes else self.args.max_length)
        with self.compute_loss_context_manager():
            sums = self.model(**inputs)
            loss = self.mean_of_step(sums, num_items_in_batch, weight)
        self.accelerator.backward(loss)
        return loss.detach(), recorded(sums)

    def release_graphs(self, why: str) -> bool:
        """Let go of the graphs and their memory, for good; whether there were any."""
        return self._graphed is not None and self._graphed.release(why)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Overrides TRL 1.16's `SFTTrainer.prediction_step`: takes the graphs' memory if it needs it, and then goes on
        with half of the rows at a time, whose losses add up to the same."""
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        except torch.OutOfMemoryError:
            again = [inputs] if self.release_graphs("evaluation needs the memory") else split(dict(inputs), 2)
            if again[0] is not inputs and not (
                len(again) > 1 and prediction_loss_only and self.processes.sharding is None
            ):
                raise
        # Outside the handler, which holds what did not fit.
        return [self.prediction_step(model, part, prediction_loss_only, *args, **kwargs) for part in again][-1]
