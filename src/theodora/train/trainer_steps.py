"""The trainer's overrides that take steps: which rows, a batch at a time, and whether the optimizer may take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import LengthGroupedSampler

from theodora.patches import replaced
from theodora.train.gradients import GradientSum
from theodora.train.order import SeededByEpoch
from theodora.train.out_of_memory import Pieces, split
from theodora.train.shares import NOTHING, shared
from theodora.train.step_state import copied, replace_metrics
from theodora.train.trainer_passes import PassOverrides


class _Parameters(list[nn.Parameter]):
    """Parameters in the place of the model that has them."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""
        return iter(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of a module."""
        for parameter in self:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.detach_().zero_()


class StepOverrides(PassOverrides):
    """Runs batches in pieces where memory asks for it, and leaves out steps that the guard refuses."""

    pieces: Pieces
    say: Callable[[str], None]
    """Tells the user."""
    _parameters_that_multiply: int | None = None
    bytes_per_step = 0
    """What this process has sent to others in each step."""
    _gradients: GradientSum | None = None
    _losses: list[Tensor]
    """Of the step at hand, until its gradients are added up."""
    _loss_of_step: Tensor | None = None
    _trained: _Parameters | None = None
    """What stands for the model where a step goes through its parameters; None: the model itself."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides transformers 5.17 to 5.23's `Trainer.train`, whose steps walk through all modules three times.

        That is for parameters with a gradient, in a model most of which is frozen: milliseconds of the host, in which
        a GPU that replays a graph has done half of its step.
        """
        self._trained = _Parameters(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        self.model.__dict__["zero_grad"] = self._trained.zero_grad
        self._gradients = None if self.processes.alone else GradientSum(self._trained, self.processes)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.model.__dict__.pop("zero_grad", None)
            self._trained = None
            self.bytes_per_step = 0 if self._gradients is None else self._gradients.bytes_sent
            self._gradients = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Overrides transformers 5.17 to 5.23's `Trainer._get_train_sampler`: rows grouped by length come in the same
        order in a resumed run."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.processes.count  # the rows of a step, of which groups are drawn
            return SeededByEpoch(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return sampler

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides transformers 5.17 to 5.23's `Trainer._get_dataloader`: of several processes each has its share."""
        if self.processes.alone:
            return super()._get_dataloader(*args, **kwargs)
        prepare: Any = self.accelerator.prepare
        with replaced(self.accelerator, prepare=lambda loader: prepare(shared(loader, self.processes))):
            return super()._get_dataloader(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides transformers 5.17 to 5.23's `Trainer.get_batch_samples`: counts the tokens of all processes."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if items is not None and not self.processes.alone:
            items = self.processes.sum(torch.as_tensor(items, device=self.args.device))
        return batches, items

    def get_total_train_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """Overrides transformers 5.17 to 5.23's `Trainer.get_total_train_batch_size`: of all processes."""
        return super().get_total_train_batch_size(*args, **kwargs) * self.processes.count

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Overrides transformers 5.17 to 5.23's `Trainer.get_decay_parameter_names`, which leaves out biases and norms.

        DoRA's magnitudes do not decay either: that would shrink the base weight itself.
        """
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".magnitude")]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Overrides TRL 1.16's `SFTTrainer.training_step`: the batch in pieces, and noted for guard and outcome.

        Without `model.train()` where it is in that mode already: it walks through all modules, and adapter layers look
        at their weights for changes.
        """
        if not (model.training and self.model.training):  # a wrapper (torch.compile's) has a mode of its own
            model.train()
        model.__dict__["train"] = lambda mode=True: model
        try:
            nothing = inputs.pop(NOTHING, False)
            whole = dict(inputs)  # computing a loss takes things out
            if nothing:
                if self.outcome is not None and self.processes.sharding is not None:
                    self.outcome.note(whole)  # which runs them on the weights that a step has left, all together
                return self._nothing(lambda: self.pieces(inputs, model, num_items_in_batch))
            loss = self.pieces(inputs, model, num_items_in_batch)
            if self._gradients is not None:
                self._losses.append(loss.detach())
            if self.guard is not None:
                self.guard.note(whole, loss)
            if self.outcome is not None:
                self.outcome.note(whole)
            return loss
        finally:
            model.__dict__.pop("train", None)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Overrides transformers 5.17 to 5.23's `Trainer._move_model_to_device`: sharded weights are where they are to
        be, in main memory perhaps."""
        if self.processes.sharding is None:
            super()._move_model_to_device(model, device)

    def start_step_over(self) -> None:
        """Forget what the step at hand has done so far, and let go of memory."""
        self.release_graphs("batches do not fit into memory as they are")
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.last_step is not None:
            self.last_step.restore_metrics_to(self)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Overrides transformers 5.17 to 5.23's `Trainer.floating_point_ops`, which walks through the parameters each
        time: the same count, walking once."""
        if self._parameters_that_multiply is None:
            self._parameters_that_multiply = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._parameters_that_multiply

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Overrides transformers 5.17 to 5.23's `Trainer._clip_grad_norm`: of the parameters that are trained, once
        the processes have added up their gradients."""
        self._add_up()
        return super()._clip_grad_norm(self._trained or model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Overrides transformers 5.17 to 5.23's `Trainer._get_grad_norm`, the last call before the optimizer's step.

        The guard looks at the step here, and a bad one leaves no trace.
        """
        self._add_up()
        grad_norm = super()._get_grad_norm(self._trained or model, grad_norm=grad_norm)
        self.pieces.end_step()
        loss, self._loss_of_step = self._loss_of_step, None
        if self.guard is None or self.guard.may_be_taken(self.state.global_step + 1, grad_norm, loss):
            if self.outcome is not None:
                self.outcome.take()
            return grad_norm
        if self.accelerator.scaler is None:  # which leaves such steps out by itself
            model.zero_grad()
        if self.last_step is not None:
            self.last_step.restore_metrics_to(self)
            self.loss_sum.copy_(self.last_step.loss)
        self.logged_at += 1  # losses are means over the steps that were taken
        self.say(f"Step {self.state.global_step + 1} was skipped; its rows are in {self.guard.file}.")
        return None

    def _add_up(self) -> None:
        """Add up gradients and losses over the processes, once in each step."""
        if self._gradients is None or self._loss_of_step is not None:
            return
        losses, self._losses = self._losses, []
        own = torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)
        self._loss_of_step = self._gradients(own)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Overrides TRL 1.16's `SFTTrainer.prediction_step`: of a batch of nothing, only what the other processes need
        this one for."""
        if inputs.pop(NOTHING, False):
            return self._nothing(lambda: self.loss_now(inputs)), None, None
        return super().prediction_step(model, inputs, *args, **kwargs)

    def loss_now(self, batch: dict[str, Any]) -> Tensor | None:
        """The loss of a batch on the weights of now, which leaves no trace in the metrics.

        Of its first piece where memory asks for pieces; None where memory does not last even so.
        """
        before = {mode: copied(self.metrics_of(mode)) for mode in ("train", "eval")}
        training, pieces = self.model.training, self.pieces.count
        self.model.eval()
        try:
            inputs = self._prepare_inputs(dict(batch) if pieces == 1 else split(dict(batch), pieces)[0])
            with torch.no_grad(), self.compute_loss_context_manager():
                return self.compute_loss(self.model, dict(inputs)).detach()
        except torch.OutOfMemoryError:
            if self.processes.sharding is not None:  # the others wait in the midst of the same pass
                raise
            return None
        finally:
            self.model.train(training)
            for mode in ("train", "eval"):
                replace_metrics(self.metrics_of(mode), before[mode])
