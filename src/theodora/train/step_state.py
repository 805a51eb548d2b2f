"""What a trainer holds between two steps beside model and optimizer, and transformers' checkpoints leave out.

Losses and metrics since the last line of the log, and the count of tokens, go into a file of the checkpoint, so that a
resumed run writes the lines that the uninterrupted one would have written. The random states let a step that was left
in its middle be taken again as if it had never begun.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from theodora.files.read_back import write_text
from theodora.train.deferred_metrics import Figures
from theodora.train.inputs import write_inputs

UNLOGGED_FILE = "unlogged.json"


@dataclass(frozen=True)
class StepState:
    """The state of a trainer at the end of a step."""

    loss: Tensor
    """Sum of the losses of the steps since the last log."""
    metrics: dict[str, list[Any]]
    tokens: Any
    random_states: tuple[Any, ...] | None

    @staticmethod
    def of(trainer: Any, *, with_random_states: bool) -> StepState:
        """Take down the state of now."""
        metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
        states = _random_states() if with_random_states else None
        return StepState(trainer._tr_loss.clone(), metrics, trainer._total_train_tokens, states)

    def restore_metrics_to(self, trainer: Any) -> None:
        """Forget the metrics and tokens counted since."""
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update({name: list(values) for name, values in self.metrics.items()})
        trainer._total_train_tokens = self.tokens

    def restore_to(self, trainer: Any) -> None:
        """Forget what has been counted since, and what was drawn."""
        trainer._tr_loss.copy_(self.loss)
        self.restore_metrics_to(trainer)
        if self.random_states is not None:
            python, numpy, cpu, cuda = self.random_states
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def write_unlogged(trainer: Any, folder: Path) -> None:
    """Write what has not been logged yet into a checkpoint."""
    metrics = Figures(trainer._metrics["train"]).read()
    found = {
        "step": trainer._globalstep_last_logged,
        "loss": trainer._tr_loss.item(),
        "tokens": int(trainer._total_train_tokens),
        "metrics": {name: values for name, values in metrics.items() if values},
    }
    write_text(folder / UNLOGGED_FILE, json.dumps(found))
    write_inputs(trainer, folder)


class RestoreUnlogged(TrainerCallback):
    """Reads it back when a run goes on; the trainer has just set everything to zero then."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Read the file of the checkpoint that the run goes on from."""
        trainer = self.trainer
        file = None if trainer.resumed_from is None else Path(trainer.resumed_from) / UNLOGGED_FILE
        if file is not None and file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            trainer._globalstep_last_logged = found["step"]
            trainer._tr_loss += found["loss"]
            trainer._total_train_tokens = found["tokens"]
            trainer._metrics["train"].clear()
            trainer._metrics["train"].update(found["metrics"])
        trainer.note_step()
