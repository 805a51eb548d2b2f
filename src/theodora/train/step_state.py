"""What a trainer holds between two steps beside model and optimizer, and transformers' checkpoints leave out.

Losses and metrics since the last line of the log, and the count of tokens, go into a file of the checkpoint, so that a
resumed run writes the lines that the uninterrupted one would have written. The random states let a step that was left
in its middle be taken again as if it had never begun.

transformers and TRL keep all of that in private fields. `CountingTrainer` gives them names; no other file touches them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from theodora.files.read_back import write_text
from theodora.train.deferred_metrics import DeferredMetrics
from theodora.train.guard import StepGuard
from theodora.train.inputs import write_inputs
from theodora.train.outcome import Outcome
from theodora.train.processes import Processes

UNLOGGED_FILE = "unlogged.json"

Metrics = dict[str, list[Any]]
"""Name -> values since the last line of the log, numbers or scalars on the device."""


@dataclass(frozen=True)
class StepState:
    """The state of a trainer at the end of a step."""

    loss: Tensor
    """Sum of the losses of the steps since the last log."""
    metrics: Metrics
    tokens: Any
    random_states: tuple[Any, ...] | None

    @staticmethod
    def of(trainer: CountingTrainer, *, with_random_states: bool) -> StepState:
        """Take down the state of now."""
        states = random_states() if with_random_states else None
        return StepState(trainer.loss_sum.clone(), copied(trainer.metrics_of("train")), trainer.tokens, states)

    def restore_metrics_to(self, trainer: CountingTrainer) -> None:
        """Forget the metrics and tokens counted since."""
        replace_metrics(trainer.metrics_of("train"), copied(self.metrics))
        trainer.tokens = self.tokens

    def restore_to(self, trainer: CountingTrainer) -> None:
        """Forget what has been counted since, and what was drawn."""
        trainer.loss_sum.copy_(self.loss)
        self.restore_metrics_to(trainer)
        if self.random_states is not None:
            restore_random_states(self.random_states)


def random_states() -> tuple[Any, ...]:
    """Of Python, NumPy, torch and the GPU, in types that torch.load takes from anybody."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    state: Any = np.random.get_state()
    kind, numbers, *rest = state
    return random.getstate(), (kind, torch.from_numpy(numbers.astype(np.int64)), *rest), torch.get_rng_state(), cuda


def restore_random_states(states: tuple[Any, ...]) -> None:
    """Go on drawing from there."""
    python, (kind, numbers, *rest), cpu, cuda = states
    random.setstate(python)
    np.random.set_state((kind, numbers.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def copied(metrics: Metrics) -> Metrics:
    """The metrics of now, whatever is added to them."""
    return {name: list(values) for name, values in metrics.items()}


def replace_metrics(metrics: Metrics, others: Metrics) -> None:
    """Give a trainer's metrics, which is a mapping that makes lists by itself, other contents."""
    metrics.clear()
    metrics.update(others)


class CountingTrainer(SFTTrainer):
    """What all groups of overrides share: the run's collaborators, and the private fields, by these names.

    | here | there | what it is (transformers 5.17 to 5.23, TRL 1.16) |
    |---|---|---|
    | `loss_sum` | transformers' `_tr_loss` | sum of the losses since the last line of the log, a scalar on the device |
    | `logged_at` | transformers' `_globalstep_last_logged` | step of that line |
    | `loss_logged` | transformers' `_total_loss_scalar` | sum of the losses up to that line |
    | `metrics_of` | TRL's `_metrics` | `Metrics` of training, and of evaluation |
    | `tokens` | TRL's `_total_train_tokens` | tokens trained on, a number or a scalar on the device |
    """

    args: SFTConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: PreTrainedModel
    processes: Processes
    guard: StepGuard | None = None
    outcome: Outcome | None = None
    resumed_from: str | None = None
    """The checkpoint that the run goes on from."""
    last_step: StepState | None = None
    """The state at the end of the last step that was finished."""

    def carried(self) -> Any:
        """What else of this process the next step goes on from, fit for JSON; None for nothing."""
        return None

    def carry_on(self, carried: Any) -> None:
        """Go on from what `carried` gave."""

    def log_arrived(self, all_of_them: bool) -> None:
        """Write the lines of the log whose figures have come, or `all_of_them`: `LogOverrides` holds lines back."""

    @property
    def loss_sum(self) -> Tensor:
        """To be changed in place: transformers holds the same tensor in a variable."""
        return self._tr_loss

    @property
    def logged_at(self) -> int:
        """The step of the last line of the log."""
        return self._globalstep_last_logged

    @logged_at.setter
    def logged_at(self, step: int) -> None:
        self._globalstep_last_logged = step

    @property
    def loss_logged(self) -> float:
        """The sum of the losses up to the last line of the log."""
        return self._total_loss_scalar

    @loss_logged.setter
    def loss_logged(self, loss: float) -> None:
        self._total_loss_scalar = loss

    def metrics_of(self, mode: Literal["train", "eval"]) -> Metrics:
        """What is recorded of the steps since the last line of the log; `log` writes the means and clears it."""
        metrics: Metrics = self._metrics[mode]
        return metrics

    @property
    def mode(self) -> Literal["train", "eval"]:
        """Whose metrics a forward pass adds to: TRL goes by the model's mode."""
        return "train" if self.model.training else "eval"

    @property
    def tokens(self) -> Any:
        """Tokens trained on so far, prompts included, padding not; perhaps still on the device."""
        return self._total_train_tokens

    @tokens.setter
    def tokens(self, tokens: Any) -> None:
        self._total_train_tokens = tokens

    @property
    def tokens_seen(self) -> int:
        """The same as a number."""
        return int(self.tokens)

    def record(self, sums: Tensor, tokens: Tensor | int) -> None:
        """Keep the metrics that TRL keeps, on the device; `log` fetches them.

        Args:
            sums: entropy, correct predictions and learned tokens of a pass in this process, and the loss that keeps
                experts balanced if there is one, (3,) or (4,) float32.
            tokens: in its batch, padding not.
        """
        metrics = self.metrics_of(self.mode)
        entropy, correct, count, *balance = sums
        metrics["entropy"].append(entropy / count.clamp(min=1))
        metrics["mean_token_accuracy"].append(correct / count.clamp(min=1))
        if balance:
            metrics["aux_loss"].append(balance[0])
        if self.mode == "train":
            self.tokens = self.tokens + tokens
        metrics["num_tokens"] = [self.tokens]

    def note_step(self) -> None:
        """Take down the state at the end of a step."""
        accumulates = self.args.gradient_accumulation_steps > 1 and self.processes.alone
        self.last_step = StepState.of(self, with_random_states=accumulates)


def unlogged(trainer: CountingTrainer) -> dict[str, Any]:
    """What a process has not logged yet."""
    metrics, carried = DeferredMetrics(trainer.metrics_of("train")).read(), trainer.carried()
    return {
        "step": trainer.logged_at,
        "loss": trainer.loss_sum.item(),
        "tokens": trainer.tokens_seen,
        "metrics": {name: values for name, values in metrics.items() if values},
        **({} if carried is None else {"carried": carried}),
    }


def write_unlogged(trainer: CountingTrainer, folder: Path, found: list[dict[str, Any]]) -> None:
    """Write it into a checkpoint, of the first process and of the others."""
    others = {"others": found[1:]} if len(found) > 1 else {}
    write_text(folder / UNLOGGED_FILE, json.dumps({**found[0], **others}))
    write_inputs(trainer, folder)


def _share_of(found: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """What of it one of the processes goes on with: as it was; or the first with all, if there were others before."""
    all_of_them = [found, *found.get("others", [])]
    if len(all_of_them) == processes.count:
        return all_of_them[processes.index]
    if not processes.first:
        return {"step": found["step"], "loss": 0.0, "tokens": 0, "metrics": {}}
    names = dict.fromkeys(name for each in all_of_them for name in each["metrics"])
    metrics = {name: [v for each in all_of_them for v in each["metrics"].get(name, [])] for name in names}
    tokens = sum(each["tokens"] for each in all_of_them)
    if "num_tokens" in metrics:
        metrics["num_tokens"] = [tokens]
    return {"step": found["step"], "loss": sum(each["loss"] for each in all_of_them), "tokens": tokens} | {
        "metrics": metrics
    }


class RestoreUnlogged(TrainerCallback):
    """Reads it back when a run goes on; the trainer has just set everything to zero then."""

    def __init__(self, trainer: CountingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Read the file of the checkpoint that the run goes on from."""
        trainer = self.trainer
        file = None if trainer.resumed_from is None else Path(trainer.resumed_from) / UNLOGGED_FILE
        if file is not None and file.is_file():
            found = _share_of(json.loads(file.read_text(encoding="utf-8")), trainer.processes)
            trainer.logged_at = found["step"]
            trainer.loss_sum.add_(found["loss"])
            trainer.tokens = found["tokens"]
            replace_metrics(trainer.metrics_of("train"), found["metrics"])
            trainer.carry_on(found.get("carried"))
        elif trainer.processes.index:
            # What is drawn in training, as dropout, is another in each process; rows were drawn alike before.
            torch.manual_seed(trainer.args.seed + trainer.processes.index)
        trainer.note_step()
