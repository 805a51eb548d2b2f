"""The trainer's overrides that compute a loss: that of a batch in training, and that of the held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from theodora.errors import ConfigError
from theodora.kernels.cross_entropy import LossSums
from theodora.layers.norm_cache import looked_at_once
from theodora.layers.token_rows import is_adapted
from theodora.patches import replaced
from theodora.train.experts import balancing_of
from theodora.train.fused_loss import LEARNED, BatchSums, Head, add_fused_loss, fused_head, fused_loss_pays
from theodora.train.loss import can_choose_positions, logits_fit, token_losses, trl_reads_logits
from theodora.train.out_of_memory import Pieces
from theodora.train.step_state import CountingTrainer, copied, replace_metrics


class LossOverrides(CountingTrainer):
    """Sees to it that an adapted output head is in the loss, and that the held-out loss is a mean over tokens."""

    head: Head | str = "not looked at yet"
    """How the fused loss reads the model's head, or why it is not used."""
    adapts_head = False
    """Whether TRL's loss would not be that of the model's own logits."""
    pieces: Pieces
    _nll = _plain_loss = _takes_positions = False
    _untraced = False
    _eval_nats = _eval_tokens = 0.0

    def choose_loss(self, kernels: str) -> None:
        """Find out how the loss can be computed; the model's forward learns to give it, where that pays.

        Raises:
            ConfigError: an adapted head was asked for, together with a loss that it cannot be in.
        """
        self.adapts_head = is_adapted(self.model.get_output_embeddings()) or not trl_reads_logits(self)
        self._nll = self.args.loss_type == "nll" and self.label_smoother is None
        self._plain_loss = self._nll and not self.aux_loss_enabled
        if self.adapts_head and not self._plain_loss:
            raise ConfigError(
                "An adapter on the output head, or a head that TRL cannot read, trains with the plain loss alone. "
                "Leave it out of targets, or set loss_type: nll, label_smoothing_factor: 0 and router_aux_loss_coef: 0."
            )
        self._takes_positions = can_choose_positions(self.model)
        # All ways to compute the loss scale it by the tokens of all micro-batches, whatever the model itself accepts.
        self.model_accepts_loss_kwargs = True
        self.head = self._fused_head(kernels)
        if isinstance(self.head, Head):
            add_fused_loss(self.model, self.head)

    def _fused_head(self, kernels: str) -> Head | str:
        if kernels == "reference":
            return "kernels: reference"
        if not fused_loss_pays(self.args.device):
            return f"not on {self.args.device.type}"
        if not self._nll:
            return "the loss is not the plain one"
        return self.read_head()

    def read_head(self) -> Head | str:
        """How the model computes its logits, and balances its experts if it is to; or why that is not known."""
        head = fused_head(self.model)
        if isinstance(head, str) or not self.aux_loss_enabled:
            return head
        balancing = balancing_of(self.model)
        return balancing if isinstance(balancing, str) else replace(head, balancing=balancing)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Overrides TRL 1.16's `SFTTrainer.compute_loss`, which passes an adapted head by and waits for the GPU.

        The loss per token: ours from the hidden states, the model's own at the learned positions, or TRL's.
        """
        learned = inputs.pop(LEARNED, None)
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if learned is not None:
            labels = inputs.pop("labels")
            sums, tokens = model(**inputs, **{LEARNED: learned}), learned["tokens"]
            inputs["labels"] = labels
        elif self.chooses_positions(inputs["labels"]):
            mask = inputs.get("attention_mask")
            sums = token_losses(model, inputs, self._takes_positions)
            tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        else:
            whole = self.router_aux_loss_coef
            with replaced(self, router_aux_loss_coef=whole * self._share_of_balance(num_items_in_batch)):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.record(recorded(sums), tokens)
        return self.mean_of_step(sums, num_items_in_batch)

    def chooses_positions(self, labels: Tensor) -> bool:
        """Whether the model itself is asked for the logits at the learned positions."""
        if self.adapts_head:
            return True
        vocabulary = self.model.config.get_text_config().vocab_size
        faster = self.args.device.type == "cpu" and logits_fit(labels, vocabulary)
        return faster and self._plain_loss and self._takes_positions

    def mean_of_step(
        self, sums: LossSums, num_items_in_batch: Tensor | int | None, weight: Tensor | float | None = None
    ) -> Tensor:
        """A batch's share of the loss per token of the whole step.

        Args:
            sums: of the batch.
            num_items_in_batch: learned tokens of the step; None if the batch stands by itself.
            weight: of the loss that keeps experts balanced; `balance_weight` if None.
        """
        items = num_items_in_batch if num_items_in_batch is not None else sums.count
        loss = sums.nats / torch.as_tensor(items).clamp(min=1)
        balance = sums.balance if isinstance(sums, BatchSums) else None
        return self.balanced(loss, balance, num_items_in_batch, weight)

    def balanced(
        self, loss: Tensor, balance: Tensor | None, num_items_in_batch: Any, weight: Tensor | float | None
    ) -> Tensor:
        """A batch's loss with the one that keeps experts balanced, if there is one; the others as of `mean_of_step`."""
        if balance is None:
            return loss
        return loss + (self.balance_weight(num_items_in_batch) if weight is None else weight) * balance

    def balance_weight(self, num_items_in_batch: Any) -> float:
        """What the loss that keeps experts balanced counts in that of a batch: as in TRL, a mean over those of a step,
        so that it does not depend on how many there are."""
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        return self.router_aux_loss_coef * self._share_of_balance(num_items_in_batch) / steps

    def _share_of_balance(self, num_items_in_batch: Any) -> float:
        """Of a pass among those of all processes, and of a batch's pieces. Nothing where it is run for others alone."""
        if self._untraced:
            return 0.0
        return 1.0 if num_items_in_batch is None else 1 / (self.processes.count * self.pieces.parts)

    def _nothing(self, run: Callable[[], Any]) -> Tensor:
        """The loss of a batch of nothing: 0. Where weights are sharded it runs, without a trace, as the others do."""
        if self.processes.sharding is not None:
            with self.untraced():
                run()
        return torch.zeros((), device=self.args.device)

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Inside the block passes leave no trace in the metrics."""
        metrics, tokens = copied(self.metrics_of(self.mode)), self.tokens
        try:
            with replaced(self, _untraced=True):
                yield
        finally:
            replace_metrics(self.metrics_of(self.mode), metrics)
            self.tokens = tokens

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Overrides transformers 5.17 to 5.23's `Trainer.evaluation_loop`, whose loss is the mean over batches.

        Here it is the mean over the tokens of all processes, which does not depend on the batch size.
        """
        self._eval_nats = self._eval_tokens = 0.0
        # A data loader draws a seed for its workers: an evaluation must not change what training draws after it.
        with torch.random.fork_rng(devices=[]), looked_at_once():  # nor does it write to weights
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.tensor([self._eval_nats, self._eval_tokens], device=self.args.device)
        nats, tokens = self.processes.sum(sums).tolist()
        if tokens and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = nats / tokens
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Overrides TRL 1.16's `SFTTrainer.prediction_step`: also adds up the loss over tokens."""
        # (A copy, because the loss takes things out.)
        loss, logits, labels = super().prediction_step(model, dict(inputs), prediction_loss_only, ignore_keys)
        items = self.items_of(inputs)
        if loss is not None and items:
            self._eval_nats += loss.item() * items
            self._eval_tokens += items
        return loss, logits, labels

    def items_of(self, inputs: dict[str, Any]) -> float:
        """What the loss of a batch is a mean over: its learned tokens."""
        return (inputs["labels"][..., 1:] != -100).sum().item()


def recorded(sums: LossSums) -> Tensor:
    """What `record` takes of the sums: entropy, correct, count, and the balancing loss if any, (3,) or (4,) float32."""
    balance = [sums.balance] if isinstance(sums, BatchSums) and sums.balance is not None else []
    return torch.stack([value.detach().float() for value in (sums.entropy, sums.correct, sums.count, *balance)])
